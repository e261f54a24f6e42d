"""Every command as it is typed: help that lists its flags, and a mistake told in one sentence."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = {  # and a flag of its own
    "data_pipelines.build": "--source", "data_pipelines.check": "--write", "data_pipelines.show": "--config",
    "data_pipelines.curate": "--estimate", "data_pipelines.budget": "--tokens",
    "data_pipelines.staging": "--source",
    "irg_jax.convert": "--source", "irg_jax.draft": "--num",
    "irg_jax.moments": "--checkpoint", "irg_jax.train": "--workdir", "irg_jax.generate": "--prompt",
    "irg_jax.evaluate": "--benchmark", "irg_jax.examine": "--num", "irg_jax.export": "--format",
    "irg_jax.infer": "--understanding_output", "irg_jax.report": "RUN", "irg_jax.make_base": "--out",
    "irg_jax.precompile": "--topology", "irg_jax.checkpoint": "--leaves", "irg_jax.serve": "--allowed_host",
}
CURATE = ["data_pipelines.curate", "--config", "configs/curate.py", "--out", "OUT"]
TRAIN = ["irg_jax.train", "--workdir", "OUT", "--config", "configs/shapes_stage1.py"]


def run(*words: str, folder: pathlib.Path = ROOT) -> tuple[int, str]:
    words = [word.replace("OUT", str(folder / "out")) for word in words]
    process = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, timeout=120)
    return process.returncode, process.stdout


def test_all_commands_are_here():
    found = {f"{path.parent.name}.{path.stem}" for folder in ("irg_jax", "data_pipelines")
             for path in (ROOT / folder).glob("*.py")
             if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(command):
    code, output = run(command, "--help")
    assert code == 0 and COMMANDS[command] in output
    source = (ROOT / f"{command.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert "define_config" not in source or "--config:" in output


@pytest.mark.parametrize("words, told", [
    ([*TRAIN, "--config.optimizer.lerning_rate=1"], "'optimizer.lerning_rate'; did you mean 'learning_rate'?"),
    ([*TRAIN, "--config.data.seed=soon"], "'data.seed' is 'soon' (str); expected int"),
    ([*TRAIN, "--wrkdir", "x"], "Unknown command line flag 'wrkdir'"),
    (["irg_jax.train", "--workdir", "OUT", "--config", "configs/none.py"], "'configs/none.py' does not exist"),
    ([*TRAIN, "--config.init_from=OUT/base"], "is no model checkpoint and no stage folder: it does not exist"),
    ([*TRAIN, "--config.init_from=assets/shapes_base"], "the released layout: python -m irg_jax.convert"),
    (["data_pipelines.build", "--config", "configs/shapes_data.py:quick", "--out", "requirements.txt/data"],
     "requirements.txt/.data.partial: Not a directory; make room or give access"),
    (["data_pipelines.build", "--config", "configs/shapes_data.py", "--out", "OUT",
      "--config.drafts=nowhere"], "nowhere holds no finished drafts"),
    ([*CURATE, "--config.prompts=nowhere.txt"], "nowhere.txt: the prompts cannot be read"),
    ([*CURATE, "--config.prompts=requirements.txt", "--config.licence="], "no licence is known"),
    ([*CURATE, "--config.filters.min_sidde=3"], "'filters.min_sidde'; did you mean 'min_side'?"),
    ([*CURATE, "--config.prompts=requirements.txt", "--config.templates=configs"], "configs/system_prompt.txt"),
    ([*CURATE, "--config.prompts=requirements.txt", "--config.painter.endpoint.key="],
     "first rounds: 'first_rounds' is no folder"),
    (["irg_jax.generate", "--config", "configs/shapes_generate.py", "--checkpoint", "OUT", "--out", "OUT",
      "--prompt", " "], "--prompt is empty"),
    (["irg_jax.evaluate", "--benchmark", "wise", "--data", "OUT", "--out", "OUT"], "out' is no folder; wise"),
    (["irg_jax.evaluate", "--benchmark", "tiif", "--out", "OUT"], "--benchmark tiif needs --data"),
    (["irg_jax.evaluate", "--benchmark", "shapes", "--out", "OUT"], "needs --config, --base, --checkpoint"),
    (["irg_jax.evaluate", "--benchmark", "wise", "--version", "new", "--data", "OUT", "--out", "OUT"],
     "wise has no version 'new'; use one of legacy, verified"),
    (["irg_jax.evaluate", "compare", "OUT", "--out", "OUT"], "holds no scores"),
    (["irg_jax.serve", "--config", "configs/shapes_generate.py", "--checkpoint", "OUT",
      "--config.serve.max_qeue=1"], "'serve.max_qeue'; did you mean 'max_queue'?"),
    (["irg_jax.serve", "--config", "configs/shapes_generate.py", "--checkpoint", "OUT",
      "--config.stop_change=1.0"], "stop_change is 1.0"),
    (["irg_jax.precompile", "--config", "configs/irgl_stage1.py", "--topology", "v5p-8", "--weights", "int8"],
     "--weights int8 is for"),
])
def test_a_mistake_is_one_sentence(words, told, tmp_path):
    code, output = run(*words, folder=tmp_path)
    lines = output.strip().splitlines()
    assert code == 1 and told in output and "Traceback" not in output
    assert len([line for line in lines if line.lower().startswith("error")]) == 1
    assert not (tmp_path / "out").exists()  # nothing that could be taken for a result
