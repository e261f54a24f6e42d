"""The scripts that start pods and clusters, with a gcloud of our own whose hosts are folders here."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
POD = {"PROJECT": "mine", "ZONE": "us-east5-a", "NAME": "pod", "ACCELERATOR_TYPE": "v5p-128"}
XPK = {"CLUSTER": "c", "PROJECT": "mine", "ZONE": "z", "WORKLOAD": "w", "TPU_TYPE": "v6e-64"}
SLURM = {"NODES": "4", "GPUS": "8", "TIME": "24:00:00"}
# Logs what it is asked; a command over ssh runs in each host's own home.
GCLOUD = """
import json, os, pathlib, subprocess, sys
root, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with open(root / "log.txt", "a") as log:
    print(json.dumps(words), file=log)
option = lambda name: words[words.index(name) + 1] if name in words else None
verb = words[3]
if verb == "describe":
    first, *rest = (root / "states.txt").read_text().split()
    (root / "states.txt").write_text(" ".join(rest or [first]))
    print(first)
if verb == "ssh" and "setup" not in option("--command"):
    hosts = sorted(root.glob("host*"))[:None if option("--worker") == "all" else 1]
    running = [subprocess.Popen(["bash", "-c", option("--command")], cwd=host,
                                env=os.environ | {"HOME": str(host), "HOSTNAME": host.name}) for host in hosts]
    code = max(each.wait() for each in running)
    lost = root / "lost.txt"
    if lost.exists() and "follow" in option("--command"):
        lost.unlink()
        code = 255
    sys.exit(code)
"""
# In the place of Python and the training: tells its arguments, and saves when told to end.
TRAIN = """#!/bin/bash
echo "$*" >>"$HOME/started.txt"
echo step 1
if [[ -n ${WAIT:-} ]]; then
    sleep 60 & child=$!
    echo "$child" >"$HOME/child.txt"
    trap 'echo saved; [[ $WAIT == stubborn ]] || exit 0' TERM
    while true; do sleep 0.1; done
fi
exit "${CODE:-0}"
"""


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with gcloud in bin/, and two hosts on which everything is set up."""
    for name, text in (("gcloud", f"#!{sys.executable}\n{GCLOUD}"), ("train", TRAIN)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "states.txt").write_text("ACTIVE")
    for host in ("host0", "host1"):
        shutil.copytree(ROOT / "launch", tmp_path / host / "irg_jax" / "launch",
                        ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(cloud: pathlib.Path, *arguments: str, script: str = "tpu_pod", **environment: str):
    added = {"CLOUD": str(cloud), "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", "POLL_SECONDS": "0",
             "PYTHON": str(cloud / "bin" / "train"), "TMPDIR": str(cloud)}
    clean = {name: value for name, value in os.environ.items() if name not in POD | XPK | SLURM}
    # Tests may run in the background of a shell, which has its children ignore SIGINT.
    return subprocess.Popen(["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments], text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            env=clean | added | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(cloud: pathlib.Path, *arguments: str, **options) -> tuple[int, str]:
    process = start(cloud, *arguments, **options)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def asked(cloud: pathlib.Path) -> list[str]:
    """The verbs that gcloud was asked for; of ssh, what was said there."""
    lines = [json.loads(line) for line in (cloud / "log.txt").read_text().splitlines()]
    return [f"ssh {line[line.index('--command') + 1]}" if line[3] == "ssh" else line[3] for line in lines]


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([program, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- what would be done ------------------------------------------------------------------------

QR = "gcloud compute tpus queued-resources"
AT = "pod --project mine --zone us-east5-a"
ALL = "--worker all --node all"


@pytest.mark.parametrize("arguments, environment, expected", [
    (["create"], {},
     f"{QR} create {AT} --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --node-id pod"),
    (["create"], {"ACCELERATOR_TYPE": "v5e-256", "SLICES": "2", "SPOT": "1"},
     f"{QR} create {AT} --accelerator-type v5litepod-256 --runtime-version v2-alpha-tpuv5-lite --node-count 2 "
     "--node-prefix pod --spot"),
    (["run", "--config", "a b.py", "--workdir", "gs"], {},
     f"{QR} ssh {AT} {ALL} --command 'bash irg_jax/launch/worker.sh start --distributed --config a\\ b.py "
     f"--workdir gs'\n{QR} ssh {AT} --worker 0 --node 0 --command 'bash irg_jax/launch/worker.sh follow'"),
    (["run", "--detach", "--config", "c"], {},
     f"{QR} ssh {AT} {ALL} --command 'bash irg_jax/launch/worker.sh start --distributed --config c'"),
    (["logs"], {}, f"{QR} ssh {AT} --worker 0 --node 0 --command 'bash irg_jax/launch/worker.sh follow'"),
    (["status"], {}, f"{QR} describe {AT} --format 'value(state.state)'\n"
                     f"{QR} ssh {AT} {ALL} --command 'bash irg_jax/launch/worker.sh status'"),
    (["stop"], {}, f"{QR} ssh {AT} {ALL} --command 'bash irg_jax/launch/worker.sh stop'"),
    (["delete"], {}, f"{QR} delete {AT} --force --quiet")])
@pytest.mark.parametrize("is_first", [True, False])
def test_dry_run_prints_the_commands_and_does_nothing(cloud, arguments, environment, expected, is_first):
    words = ["--dry-run", *arguments] if is_first else [*arguments, "--dry-run"]
    code, output = run(cloud, *words, **POD | environment)
    assert code == 0, output
    assert list(map(shlex.split, output.splitlines())) == list(map(shlex.split, expected.splitlines()))
    assert not (cloud / "log.txt").exists()


@pytest.mark.parametrize("command", ["create", "setup", "logs", "status", "stop", "delete"])
def test_a_word_too_many_does_nothing(cloud, command):
    code, output = run(cloud, command, "--topology", "x", **POD)
    assert code == 1 and f"unexpected '--topology' after {command}" in output
    assert not (cloud / "log.txt").exists()


def test_setup_copies_the_last_commit_to_all_hosts(cloud):
    code, output = run(cloud, "--dry-run", "setup", **POD, PREPARE="mount it")
    archive = f"{cloud}/irg_jax_pod.tar.gz"
    commands = [shlex.split(line) for line in output.splitlines() if not line.startswith("note:")]
    assert code == 0 and commands[0] == shlex.split(f"git archive --format tar.gz --output {archive} HEAD")
    assert commands[1] == shlex.split(
        f"{QR} scp {archive} pod:irg_jax.tar.gz --project mine --zone us-east5-a {ALL}")
    assert commands[2] == shlex.split(f"{QR} ssh {AT} {ALL} --command 'mount it'")
    assert "tar -xzf irg_jax.tar.gz -C irg_jax" in commands[3][-1] and commands[4] == ["rm", "-f", archive]


def test_xpk_and_slurm_print_one_command(cloud):
    code, output = run(cloud, "--dry-run", "--config", "a b.py", script="xpk", **XPK)
    words = shlex.split(output)
    assert code == 0 and words[:3] == ["xpk", "workload", "create"]
    assert words[words.index("--command") + 1] == (
        "bash launch/worker.sh setup && exec .venv/bin/python -u -m irg_jax.train --distributed "
        "--config a\\ b.py")
    assert words[words.index("--tpu-type") + 1] == "v6e-64" and words[words.index("--num-slices") + 1] == "1"
    options = {"script": "slurm", "SBATCH": "--partition=p --qos=q"} | SLURM
    code, output = run(cloud, "--dry-run", "--config", "c.py", **options)
    words = shlex.split(output)
    assert code == 0 and words[0] == "sbatch" and {"--partition=p", "--qos=q", "--requeue"} <= set(words)
    assert words[words.index("--ntasks-per-node") + 1] == "1" and words[words.index("--nodes") + 1] == "4"
    batch = words[words.index("--wrap") + 1]
    assert "srun --kill-on-bad-exit=1 .venv/bin/python -u -m irg_jax.train --config c.py &" in batch
    subprocess.run(["bash", "-n"], input=batch, text=True, check=True)


@pytest.mark.parametrize("told, code, requeued", [(False, 0, False), (False, 3, False), (True, 0, True)])
def test_a_slurm_job_that_is_told_to_save_queues_again(cloud, told, code, requeued):
    """The batch script itself, with commands of ours in the place of SLURM's."""
    batch = shlex.split(run(cloud, "--dry-run", "--config", "c", script="slurm", **SLURM)[1])[-1]
    log = cloud / "slurm.txt"
    programs = {"srun": f'echo $$ >{cloud}/task; trap "exit {code}" TERM; '
                        + (f"while true; do sleep 0.1; done" if told else f"exit {code}"),
                "scancel": f'echo scancel "$@" >>{log}; kill -TERM $(cat {cloud}/task)',
                "scontrol": f'echo scontrol "$@" >>{log}'}
    for name, body in programs.items():
        (cloud / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (cloud / "bin" / name).chmod(0o755)
    process = subprocess.Popen(["bash", "-c", batch], cwd=cloud, env=os.environ | {
        "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"})
    if told:
        await_file(cloud / "task")
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) in ((code,) if not told else (0, 128 + signal.SIGTERM))
    found = log.read_text() if log.exists() else ""
    assert found == ("scancel --signal TERM 77\nscontrol requeue 77\n" if requeued else "")


@pytest.mark.parametrize("script, needed", [("tpu_pod", POD), ("xpk", XPK), ("slurm", SLURM)])
def test_a_missing_variable_is_named(cloud, script, needed):
    for name in needed:
        given = {other: value for other, value in needed.items() if other != name}
        code, output = run(cloud, "--dry-run", "run", "--config", "c", script=script, **given)
        assert code == 1 and output == f"error: {name} is not set; --help lists what is needed\n"
    code, output = run(cloud, "--help", script=script)
    assert code == 0 and output.startswith(f"usage: bash launch/{script}.sh")
    assert all(name in output for name in needed)


@pytest.mark.parametrize("arguments, environment, sentence", [
    (["fly"], {}, "unknown command 'fly'"), (["run"], {}, "run needs the arguments of the training"),
    (["create"], {"SLICES": "0"}, "SLICES is '0'"), (["create"], {"SPOT": "yes"}, "SPOT is 'yes'"),
    (["create"], {"ACCELERATOR_TYPE": "v9-8"}, "no RUNTIME_VERSION is known for ACCELERATOR_TYPE 'v9-8'")])
def test_what_cannot_be_meant_is_refused(cloud, arguments, environment, sentence):
    code, output = run(cloud, *arguments, **POD | environment)
    assert code == 1 and sentence in output and not (cloud / "log.txt").exists()


# ---- what is done ------------------------------------------------------------------------------

def test_create_waits_until_the_slice_is_there(cloud):
    (cloud / "states.txt").write_text("WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    code, output = run(cloud, "create", **POD)
    assert code == 0 and [line.split()[-1] for line in output.splitlines()] == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (cloud / "states.txt").write_text("PROVISIONING FAILED")
    code, output = run(cloud, "create", **POD)
    assert code == 1 and "pod is FAILED and will not come" in output


@pytest.mark.parametrize("code", ["0", "3"])
def test_a_run_starts_on_every_host_and_ends_with_its_status(cloud, code):
    status, output = run(cloud, "run", "--config", "a b.py", "--workdir", "w", CODE=code, **POD)
    assert status == int(code) and output.count("step 1") == 1   # of host 0 alone
    for host in ("host0", "host1"):
        assert (cloud / host / "started.txt").read_text() == (
            "-u -m irg_jax.train --distributed --config a b.py --workdir w\n")
    assert "host1: ended with status " + code in run(cloud, "status", **POD)[1]
    assert run(cloud, "logs", **POD) == (int(code), "step 1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_interrupting_a_run_saves_and_ends_it_on_all_hosts(cloud, number):
    process = start(cloud, "run", "--config", "c", WAIT="yes", **POD)
    children = [await_file(cloud / host / "child.txt") for host in ("host0", "host1")]
    assert "host1: running: step 1" in run(cloud, "status", **POD)[1]
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and output.count(": stopped") == 2
    for host, child in zip(("host0", "host1"), children):
        assert "saved" in (cloud / host / "irg_run" / "log.txt").read_text()
        assert is_gone(child)


def test_a_detached_run_goes_on_and_a_new_one_ends_it(cloud):
    assert run(cloud, "run", "--detach", "--config", "1", WAIT="yes", **POD)[0] == 0
    first = [await_file(cloud / host / "child.txt") for host in ("host0", "host1")]
    assert all(map(is_running, first))
    code, output = run(cloud, "run", "--config", "2", **POD)
    assert code == 0 and output.count(": stopped") == 2 and all(map(is_gone, first))


def test_a_run_that_does_not_end_is_killed_with_its_children(cloud):
    run(cloud, "run", "--detach", "--config", "1", WAIT="stubborn", **POD)
    children = [await_file(cloud / host / "child.txt") for host in ("host0", "host1")]
    code, output = run(cloud, "stop", STOP_SECONDS="1", **POD)
    assert code == 0 and output.count("killed after 1 seconds") == 2 and all(map(is_gone, children))
    assert "ended with status 137" in run(cloud, "status", **POD)[1]


def test_a_slice_that_is_taken_away_is_made_again_and_the_run_resumed(cloud):
    (cloud / "lost.txt").touch()
    (cloud / "states.txt").write_text("SUSPENDED PROVISIONING ACTIVE")
    code, output = run(cloud, "run", "--config", "c", **POD, SPOT="1")
    assert code == 0 and "pod was taken away; asking for it again" in output
    begun, again = "ssh bash irg_jax/launch/worker.sh start --distributed --config c", "create"
    verbs = [verb for verb in asked(cloud) if verb != "describe"]
    assert verbs[:1] == [begun] and verbs[2:5] == ["delete", again, "scp"] and verbs.count(begun) == 2
    assert (cloud / "host1" / "started.txt").read_text().count("--config c") == 2


def test_a_connection_that_breaks_ends_no_run(cloud):
    (cloud / "lost.txt").touch()
    code, output = run(cloud, "run", "--config", "c", **POD, SPOT="1")
    assert code == 0 and "delete" not in asked(cloud) and output.count("step 1") == 2   # shown again


def test_a_run_that_fails_by_itself_is_not_started_again(cloud):
    code, _ = run(cloud, "run", "--config", "c", CODE="4", **POD, SPOT="1")
    assert code == 4 and (cloud / "host0" / "started.txt").read_text().count("--config c") == 1


def await_file(path: pathlib.Path) -> int:
    """The number in it, once it is there."""
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return int(path.read_text())


def is_running(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def is_gone(pid: int) -> bool:
    """Within a second."""
    deadline = time.monotonic() + 1
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)
