"""The recipe of the base in one go, far too small to learn anything: every stage runs."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from configs import shapes_base
from irg_jax import make_base
from irg_jax.checkpoints.bagel import import_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = '''
import ml_collections
from configs import shapes_base, shapes_base_data

def get_config(part="recipe"):
    if part != "recipe":
        data = shapes_base_data.get_config(part)
        data.counts = ml_collections.ConfigDict({name: 24 for name in data.counts})
        return data
    config = shapes_base.get_config()
    config.data_config, config.drafts.data_config = f"{__file__}:all", f"{__file__}:own"
    config.drafts.config, config.drafts.num = "configs/shapes_generate.py:quick", 4
    config.autoencoder.update({"total_steps": 2, "full_steps": 1, "batch_size": 2, "num_images": 20})
    config.encoder.update({"total_steps": 2, "batch_size": 4, "num_images": 8})
    for stage in ("draw", "see", "read", "train", "mend"):
        config[stage].update({"total_steps": 2})
        config[stage].optimizer.warmup_steps = 1
        config[stage].data.packs_per_step = 2
    return config
'''


def test_a_finished_base_is_left_alone(tmp_path, monkeypatch, capsys):
    """The command again, after all; and after its last stage went on."""
    for name in ("build", "prepare", "give_eyes", "draw_own", "compute_moments", "load_model"):
        monkeypatch.setattr(make_base, name, lambda *args, **options: None)
    monkeypatch.setattr(make_base, "train", lambda stage, *args, **options: stage.total_steps)
    (tmp_path / "run" / "initial" / "params").mkdir(parents=True)
    written = []
    monkeypatch.setattr(make_base, "export_folder", lambda model, out, dtype: written.append(out))
    config, out = shapes_base.get_config(), tmp_path / "out"
    step = tmp_path / "run" / config.mend.stage / "checkpoints" / "2"
    step.mkdir(parents=True)
    (step / "digests.json").write_text("{}")
    values = types.SimpleNamespace(config=config, workdir=str(tmp_path / "run"), out=str(out),
                                   accept_changes=[])
    make_base.main(values)
    out.mkdir()    # empty, and made by whoever
    make_base.main(values)
    assert written == [str(out)] * 2
    (out / "ema.safetensors").write_text("written")
    os.utime(step, (1, 1))
    make_base.main(values)
    assert len(written) == 2 and "is younger than the last checkpoint" in capsys.readouterr().out
    os.utime(out, (0, 0))
    make_base.main(values)
    assert len(written) == 3


@pytest.mark.parametrize("there, missing", [
    ({"initial"}, ["draw", "see", "read", "base", "mend"]),
    ({"initial", "seeing"}, ["see", "read", "base", "mend"]),
    ({"seeing"}, ["see", "read", "base", "mend"]),
    ({"see", "initial"}, ["read", "base", "mend"]), ({"base"}, ["mend"]),
    (set(), ["draw", "see", "read", "base", "mend"])])
def test_it_begins_after_the_last_checkpoint_that_is_there(tmp_path, monkeypatch, there, missing):
    """A checkpoint handed over from another machine takes the place of what led to it."""
    trained, drafted, built = [], [], []
    make = lambda name: (tmp_path / name / "params").mkdir(parents=True)
    for name in ("compute_moments", "load_model", "give_eyes", "export_folder"):
        monkeypatch.setattr(make_base, name, lambda *args, **options: None)
    monkeypatch.setattr(make_base, "build", lambda config, out: built.append(out))
    monkeypatch.setattr(make_base, "prepare", lambda config, workdir: make("initial"))
    monkeypatch.setattr(make_base, "draw_own", lambda config, drawer, workdir: drafted.append(drawer))
    monkeypatch.setattr(make_base, "is_exported", lambda *args: False)
    monkeypatch.setattr(make_base, "train", lambda stage, *args, **options:
                        trained.append(stage.stage) or stage.total_steps)
    for name in there:
        make(name)
    make_base.main(types.SimpleNamespace(config=shapes_base.get_config(), workdir=str(tmp_path),
                                         out=str(tmp_path / "out"), accept_changes=[]))
    assert trained == missing and drafted == [tmp_path / "base"]
    assert built == ([] if there == {"base"} else [tmp_path / "data"])    # `mend` has data of its own
    assert (tmp_path / "initial").exists() == ("initial" in there or not there)


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "irg_jax.make_base", "--config", str(tmp_path / "recipe.py"),
               "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": ""})   # one device, as its users have
    assert done.returncode == 0, done.stderr[-3000:]
    assert import_folder(tmp_path / "out").tokenizer.vocab_size <= 512
    drafts = json.loads((tmp_path / "run/drafts/inputs.json").read_text())
    assert drafts["is_planned"] is False    # the base thinks in its own way
    checkpoints = {path: path.stat().st_mtime for path in (tmp_path / "run").rglob("checkpoints/*")}
    assert {path.parent.parent.name for path in checkpoints} >= {"draw", "see", "read", "base", "mend"}
