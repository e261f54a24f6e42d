"""The shell scripts, with commands of our own in the place of the real ones."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
MODULES = ("irg_jax.convert", "data_pipelines.build", "irg_jax.train", "irg_jax.generate",
           "irg_jax.evaluate", "irg_jax.export", "irg_jax.report", "irg_jax.draft", "irg_jax.moments")
# Logs its arguments; does what the environment says: fails, or waits with a child of its own.
COMMAND = """
import os, subprocess, sys, time
name = os.path.basename(sys.argv[0]).removesuffix(".py")
with open("log.txt", "a") as log:
    print(name, *sys.argv[1:], file=log)
with open("malloc.txt", "a") as log:
    print(os.environ["GLIBC_TUNABLES"], file=log)
if os.environ.get("FAIL") == name:
    sys.exit(7)
if os.environ.get("WAIT") == name:
    child = subprocess.Popen(["sleep", "60"])
    with open("child.tmp", "w") as file:
        file.write(str(child.pid))
    os.rename("child.tmp", "child.txt")
    time.sleep(60)
"""


@pytest.fixture
def house(tmp_path: pathlib.Path) -> pathlib.Path:
    """A repository of launch/ and commands that only log, with an environment that is set up."""
    root = tmp_path / "house"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements.txt").write_text("nothing==1\n")
    for module in MODULES:
        path = root / (module.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMMAND)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # A script and not a link: Python would look for its environment beside the link.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / "requirements.sha256").write_text(
        hashlib.sha256((root / "requirements.txt").read_bytes()).hexdigest())
    return root


def start(root: pathlib.Path, *arguments: str, cwd: pathlib.Path | None = None, **environment: str):
    """Starts local.sh; the output is one text."""
    read = ("VENV", "PYTHON", "GLIBC_TUNABLES")
    clean = {name: value for name, value in os.environ.items() if name not in read}
    return subprocess.Popen(["bash", str(root / "launch" / "local.sh"), *arguments], cwd=cwd or root,
                            env=clean | environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run(root: pathlib.Path, *arguments: str, **options) -> tuple[int, str]:
    process = start(root, *arguments, **options)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def logged(root: pathlib.Path) -> list[str]:
    return (root / "log.txt").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_help_sets_nothing_up(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    code, output = run(tmp_path, "--help")
    assert code == 0
    assert "--quick" in output and "--out DIR" in output and "runs/shapes" in output
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--quik"], "'--quik'"), (["--out"], "--out"), (["--out", ""], "--out"), (["more"], "'more'"),
    (["--seed"], "--seed"), (["--seed", "one"], "'one'"), (["--seed=-1"], "'-1'")])
def test_unknown_options_are_named(house, arguments, words):
    code, output = run(house, *arguments)
    assert code == 2 and words in output
    assert not (house / "log.txt").exists()


def test_job_runs_the_public_commands_in_order(house):
    code, output = run(house, "--out", "runs/a b")
    assert code == 0, output
    lines = logged(house)
    assert [line.split()[0] for line in lines] == [
        "convert", "draft", "build", "moments", "train", "train", "generate", "evaluate", "export", "report"]
    assert lines[0] == "convert --source assets/shapes_base --target runs/a b/base"
    assert "--config configs/shapes_stage1.py --workdir runs/a b" in lines[4]
    assert "--prompt two red circles left of a blue square" in lines[6]
    assert not any(":quick" in line for line in lines)
    assert "step 5 of 10: stage1" in output and "left)" in output
    assert "-m irg_jax.convert --source assets/shapes_base --target 'runs/a b/base'" in output


@pytest.mark.parametrize("own", ["", "glibc.malloc.arena_max=1"])
def test_commands_have_huge_pages_unless_the_caller_says_otherwise(house, own):
    assert run(house, **({"GLIBC_TUNABLES": own} if own else {}))[0] == 0
    assert set((house / "malloc.txt").read_text().splitlines()) == {own or "glibc.malloc.hugetlb=1"}


def test_quick_takes_every_quick_config(house):
    run(house, "--quick")
    with_config = [line for line in logged(house) if "--config " in line]
    assert len(with_config) == 7
    assert all(".py:quick" in line for line in with_config)


def test_a_seed_reaches_what_is_drawn_and_trained_and_not_the_prompts(house):
    assert run(house, "--seed", "2")[0] == 0
    lines = logged(house)
    seeded = {line.split()[0] for line in lines if "seed" in line}
    assert seeded == {"draft", "train", "evaluate"}
    assert all(line.endswith("--seed 2") for line in lines if line.split()[0] in ("draft", "evaluate"))
    assert all(line.endswith("--config.seed=44 --config.data.seed=44") for line in lines if line[:5] == "train")
    assert (house / "runs" / "shapes" / "size.txt").read_text() == "full seed 2\n"
    code, output = run(house)
    assert code == 1 and "holds a full seed 2 run" in output
    code, output = run(house, "--seed=2", FAIL="build")
    assert code == 7 and "bash launch/local.sh --seed 2 --out runs/shapes" in output


def test_out_is_meant_where_the_caller_stands(house, tmp_path):
    code, _ = run(house, "--out", "mine", cwd=tmp_path)
    assert code == 0
    assert (tmp_path / "mine" / "size.txt").read_text() == "full\n"
    assert logged(house)[-1] == f"report {tmp_path}/mine"


@pytest.mark.parametrize("first, second", [(["--quick"], []), ([], ["--quick"])])
def test_quick_and_full_do_not_mix(house, first, second):
    assert run(house, *first)[0] == 0
    before = logged(house)
    code, output = run(house, *second)
    assert code == 1
    assert "error: runs/shapes holds a" in output and "choose another --out" in output
    assert "Traceback" not in output
    assert logged(house) == before


def test_foreign_folder_is_left_alone(house):
    (house / "mine").mkdir()
    (house / "mine" / "letter.txt").write_text("dear")
    code, output = run(house, "--out", "mine")
    assert code == 1 and "holds files and no run" in output
    assert [path.name for path in (house / "mine").iterdir()] == ["letter.txt"]


def test_failure_stops_the_job_with_its_status(house):
    code, output = run(house, "--quick", FAIL="build")
    assert code == 7
    assert [line.split()[0] for line in logged(house)] == ["convert", "draft", "build"]
    assert "step 3 of 10: data failed" in output and "exit status 7" in output
    assert "bash launch/local.sh --quick --out runs/shapes" in output
    assert run(house, "--quick")[0] == 0  # and that line resumes


def test_seconds_add_up_over_runs(house):
    assert run(house, "--quick", FAIL="build")[0] == 7
    path = house / "runs" / "shapes" / "timings.json"
    timings = json.loads(path.read_text())
    timings["convert"] += 100
    path.write_text(json.dumps(timings))
    assert run(house, "--quick")[0] == 0
    timings = json.loads(path.read_text())
    peaks = timings.pop("peak_rss_gib")
    assert set(timings) == set(peaks) == {"convert", "drafts", "data", "moments", "stage1", "stage2",
                                          "generate", "evaluate", "export", "report"}
    assert 100 < timings["convert"] < 130
    assert all(0.001 < peak < 1 for peak in peaks.values())


def test_export_is_made_again_only_after_a_new_checkpoint(house):
    out = house / "runs" / "shapes"
    assert run(house, "--quick")[0] == 0
    (out / "stage2" / "checkpoints").mkdir(parents=True)
    (out / "export").mkdir()
    os.utime(out / "stage2" / "checkpoints", (1, 1))
    (house / "log.txt").unlink()
    assert "step 9 of 10: export is up to date" in run(house, "--quick")[1]
    assert not any(line.startswith("export") for line in logged(house))
    os.utime(out / "export", (0, 0))
    assert run(house, "--quick")[0] == 0
    assert any(line.startswith("export") for line in logged(house))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_interrupt_ends_command_and_its_children(house, number):
    process = start(house, "--quick", WAIT="train")
    await_file(house / "child.txt")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "to resume" in output and "Traceback" not in output
    assert [line.split()[0] for line in logged(house)] == [
        "convert", "draft", "build", "moments", "train"]
    assert not is_running(int((house / "child.txt").read_text()))
    assert "stage1" in json.loads((house / "runs" / "shapes" / "timings.json").read_text())


def test_second_job_in_the_same_folder_is_refused(house):
    first = start(house, WAIT="convert")
    await_file(house / "child.txt")
    code, output = run(house)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)
    assert code == 1 and "another local.sh is at work" in output


def test_set_up_skips_a_python_that_does_not_run(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("python3.11", "exit 127"), ("python3.12", f'exec {sys.executable} "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv")}
    line = ["bash", "launch/setup.sh"]
    first = subprocess.run(line, cwd=tmp_path, env=os.environ | environment | {"PYTHON": ""},
                           capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert f"with {programs}/python3.12" in first.stdout
    again = subprocess.run(line, cwd=tmp_path, env=os.environ | environment, capture_output=True,
                           text=True)
    assert again.stdout == f"setup: {tmp_path / 'venv'} is up to date\n"
    wrong = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | environment | {"VENV": "other", "PYTHON": "no_python"})
    assert wrong.returncode == 1 and "no_python is not a Python 3.11" in wrong.stderr


def test_set_up_brings_cuda_where_there_is_a_gpu(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "requirements-cuda.txt", "nvidia-smi"):
        (tmp_path / name).write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "VENV": "new"}
    installed = lambda **more: "requirements-cuda.txt" in subprocess.run(
        ["bash", "launch/setup.sh"], cwd=tmp_path, env=os.environ | environment | more, text=True,
        capture_output=True, check=True).stdout
    assert not installed(JAX_PLATFORMS="")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    assert not installed(JAX_PLATFORMS="cpu")
    assert installed(JAX_PLATFORMS="") and not installed(JAX_PLATFORMS="cuda,cpu")   # it is there by then
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert not installed(JAX_PLATFORMS="")


def test_set_up_clears_no_environment_that_is_not_ours(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "theirs" / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "notes.txt", "bin/python"):    # which does not run
        (tmp_path / "theirs" / name).write_text("")
    process = subprocess.run(["bash", "launch/setup.sh"], cwd=tmp_path, capture_output=True, text=True,
                             env=os.environ | {"PYTHON": sys.executable, "VENV": "theirs"})
    assert process.returncode == 1 and "theirs exists and is no virtual environment of ours" in process.stderr
    assert (tmp_path / "theirs" / "notes.txt").exists()
    process = subprocess.run(["bash", "launch/setup.sh", "--help"], cwd=tmp_path, capture_output=True,
                             text=True)
    assert process.returncode == 0 and process.stdout.startswith("Makes a virtual environment")
    assert not (tmp_path / ".venv").exists()


def test_set_up_without_ensurepip_says_what_to_install(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / "bare_python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    process = subprocess.run(["bash", "launch/setup.sh"], cwd=tmp_path, capture_output=True, text=True,
                             env=os.environ | {"PYTHON": str(python), "VENV": "new"})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {python} cannot make virtual environments")
    assert f"apt-get install {version}-venv" in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def await_file(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process lives; one that only waits to be collected does not."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        status = pathlib.Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.02)
    return True
