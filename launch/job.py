"""Runs the main job, one public command after another; `local.sh` starts it.

    python launch/job.py full|quick OUT [SEED]

Every command resumes or finds its work done, so the whole job is run again after an interruption.
OUT/size.txt says which size and seed the folder holds. OUT/timings.json adds up the seconds of each step over
all runs and keeps its peak memory: {"stage1": 310.2, ..., "peak_rss_gib": {"stage1": 1.9, ...}}.
Only the standard library is needed.
"""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple, TextIO

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "two red circles left of a blue square"
GRACE_SECONDS = 30     # what an interrupted command gets to put its things in order
WRITE_SECONDS = 5      # timings on disk are never older than this
GIB = 2**30
# XLA on CPUs takes temporaries from malloc and gives them back each step: huge pages spare it their faults.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

_received: list[int] = []  # signals; a handler that raised could lose a command just started


class Step(NamedTuple):
    """One command; `seconds` is what it took on two cores, for the estimates: (quick, full)."""

    name: str
    seconds: tuple[float, float]
    arguments: tuple[str, ...]


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP, whose number is the argument."""


def list_steps(size: str, out: str, seed: int = 0) -> list[Step]:
    """The job; `size` is "full" or "quick", which every configuration file knows.

    A seed is one of drafts, training and noise; prompts, split and detector know none.
    """
    config = lambda name: f"configs/{name}.py" + (":quick" if size == "quick" else "")
    command = lambda line: tuple(part.format(out=out) for part in line.split())
    seeded = ("--seed", str(seed)) if seed else ()
    train_seeded = (f"--config.seed={42 + seed}", f"--config.data.seed={42 + seed}") if seed else ()
    return [
        Step("convert", (3, 3), command(
            "-m irg_jax.convert --source assets/shapes_base --target {out}/base")),
        Step("drafts", (20, 235), (*command(
            f"-m irg_jax.draft --config {config('shapes_generate')} --checkpoint {{out}}/base"
            " --out {out}/drafts --num"), "48" if size == "quick" else "3500", *seeded)),
        Step("data", (4, 45), command(
            f"-m data_pipelines.build --config {config('shapes_data')} --source shapes"
            " --format parquet --out {out}/data --config.drafts={out}/drafts")),
        Step("moments", (10, 115), command(
            f"-m irg_jax.moments --config {config('shapes_stage1')} --checkpoint {{out}}/base"
            " --config.data.source={out}/data --batch_size 16 --out {out}/moments")),
        Step("stage1", (33, 590), (*command(
            f"-m irg_jax.train --config {config('shapes_stage1')} --workdir {{out}}"
            " --config.init_from={out}/base --config.data.source={out}/data"
            " --config.data.moments={out}/moments"), *train_seeded)),
        Step("stage2", (30, 1100), (*command(
            f"-m irg_jax.train --config {config('shapes_stage2')} --workdir {{out}}"
            " --config.data.source={out}/data --config.data.moments={out}/moments"), *train_seeded)),
        Step("generate", (20, 17), (*command(
            f"-m irg_jax.generate --config {config('shapes_generate')} --checkpoint {{out}}/stage2"
            " --out {out}/generate"), "--prompt", PROMPT)),
        Step("evaluate", (32, 160), (*command(
            f"-m irg_jax.evaluate --benchmark shapes --config {config('shapes_generate')}"
            " --base {out}/base --checkpoint {out}/stage2"
            " --prompts {out}/data/prompts_heldout.jsonl --out {out}/eval/shapes"), *seeded)),
        Step("export", (3, 3), command(
            "-m irg_jax.export --checkpoint {out}/stage2 --format bagel --out {out}/export")),
        Step("report", (1, 1), command("-m irg_jax.report {out}")),
    ]


class Timings:
    """OUT/timings.json. Raises ValueError if the file there is no object of numbers."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self.seconds = json.loads(path.read_text()) if path.exists() else {}
            self._peaks = self.seconds.pop("peak_rss_gib", {})
            self._before = {name: float(value) for name, value in self.seconds.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold timings ({error}); remove it") from error

    def record(self, name: str, seconds: float, peak_rss: int = 0) -> None:
        """`seconds` since this run began the step; `peak_rss` in bytes, once it is known."""
        self.seconds[name] = round(self._before.get(name, 0.0) + seconds, 1)
        if peak_rss:
            self._peaks[name] = round(max(self._peaks.get(name, 0.0), peak_rss / GIB), 3)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(self.seconds | {"peak_rss_gib": self._peaks}, indent=2) + "\n")
        temporary.replace(self._path)


def claim(out: pathlib.Path, size: str, seed: int) -> TextIO:
    """Marks `out` as a run of `size` and `seed`; the open file holds the lock against a second job there.

    Raises: ValueError if `out` holds a run of another size or seed, something else, or a job at work.
    """
    wanted = f"{size} seed {seed}" if seed else size
    mark = out / "size.txt"
    out.mkdir(parents=True, exist_ok=True)
    if not mark.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files and no run of local.sh; choose another --out")
    file = mark.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another local.sh is at work in {out}; wait for it, or choose another "
                         "--out") from error
    file.seek(0)
    found = file.read().strip() or wanted
    if found != wanted:
        raise ValueError(f"{out} holds a {found} run, and this is a {wanted} one; run it "
                         f"{'with' if found.startswith('quick') else 'without'} --quick and with its --seed, "
                         "or choose another --out")
    if not mark.stat().st_size:
        file.write(wanted + "\n")
        file.flush()
    return file


def run_command(command: list[str], name: str, timings: Timings) -> int:
    """Runs it in a process group of its own; returns its exit status, 128 + n after signal n.

    Raises: Interrupted after a signal to us, once the whole group has ended: it is asked to, and
    after GRACE_SECONDS or a second signal it is killed.
    """
    begin = written = time.monotonic()
    deadline = None
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | os.environ, stdin=subprocess.DEVNULL,
                               process_group=0)
    # wait4 tells this command's peak memory; getrusage would give the largest of all steps.
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        now = time.monotonic()
        if _received and deadline is None:
            deadline = now + GRACE_SECONDS
            _end_group(process.pid, signal.SIGTERM)
        if deadline is not None and (now > deadline or len(_received) > 1):
            _end_group(process.pid, signal.SIGKILL)
        if now - written > WRITE_SECONDS:
            timings.record(name, now - begin)
            written = now
        time.sleep(0.05)
    _, status, usage = ended
    _end_group(process.pid, signal.SIGKILL)  # workers that outlive their command
    process.returncode = os.waitstatus_to_exitcode(status)
    timings.record(name, time.monotonic() - begin,
                   usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    if _received:
        raise Interrupted(_received[0])
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left (macOS says so with a PermissionError)


def estimate(steps: list[Step], current: int, size: str, timings: Timings) -> float:
    """Seconds that steps from `current` on still need: the table's, scaled by this machine's pace."""
    expected = [step.seconds[size == "full"] for step in steps]
    taken = [timings.seconds.get(step.name, 0.0) for step in steps]
    pace = sum(taken[:current]) / sum(expected[:current]) if current else 1.0
    pace = min(max(pace, 0.2), 5.0)  # a step that was found done, or done twice, says little
    return sum(max(pace * want - had, 1.0)
               for want, had in zip(expected[current:], taken[current:], strict=True))


def is_exported(out: pathlib.Path) -> bool:
    """Whether the export is there and younger than the last checkpoint."""
    export, checkpoints = out / "export", out / "stage2" / "checkpoints"
    return (export.is_dir() and checkpoints.is_dir()
            and export.stat().st_mtime > checkpoints.stat().st_mtime)


def run_job(size: str, out: pathlib.Path, seed: int) -> int:
    """All steps; stops at the first that fails and returns its exit status."""
    timings = Timings(out / "timings.json")
    steps = list_steps(size, str(out), seed)
    begin = time.monotonic()
    for index, step in enumerate(steps):
        label = f"step {index + 1} of {len(steps)}: {step.name}"
        if step.name == "export":
            if is_exported(out):
                print(f"\n{label} is up to date", flush=True)
                continue
            shutil.rmtree(out / "export", ignore_errors=True)
        started = time.monotonic()
        print(f"\n{label} ({format_seconds(started - begin)} so far, about "
              f"{format_seconds(estimate(steps, index, size, timings))} left)", flush=True)
        print(f"$ {shlex.join([_shorten(sys.executable), *step.arguments])}", flush=True)
        status = run_command([sys.executable, *step.arguments], step.name, timings)
        taken = format_seconds(time.monotonic() - started)
        if status:
            print(f"\nerror: {label} failed after {taken} with exit status {status}; to resume:\n"
                  f"  {resume_line(size, out, seed)}", file=sys.stderr)
            return status
        if step is not steps[-1]:  # the report's own last words end the job
            print(f"{label} took {taken}", flush=True)
    return 0


def resume_line(size: str, out: pathlib.Path, seed: int) -> str:
    """What the user typed, as it may be typed again."""
    quick = ["--quick"] if size == "quick" else []
    seeded = ["--seed", str(seed)] if seed else []
    return shlex.join(["bash", "launch/local.sh", *quick, *seeded, "--out", str(out)])


def format_seconds(seconds: float) -> str:
    """8.4 s, 95 s, 12 min, 3.1 h"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _shorten(path: str) -> str:
    return os.path.relpath(path, ROOT) if pathlib.Path(path).is_relative_to(ROOT) else path


def main(size: str, out: pathlib.Path, seed: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: _received.append(number))
    try:
        with claim(out, size, seed):
            return run_job(size, out, seed)
    except Interrupted as error:
        print(f"\ninterrupted; to resume:\n  {resume_line(size, out, seed)}", file=sys.stderr)
        return 128 + error.args[0]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    seed = sys.argv[3] if len(sys.argv) == 4 else "0"
    is_sound = len(sys.argv) in (3, 4) and sys.argv[1] in ("full", "quick") and re.fullmatch(r"\d{1,6}", seed)
    if not is_sound:
        sys.exit("usage: python launch/job.py full|quick OUT [SEED]; SEED is a whole number below a million")
    sys.exit(main(sys.argv[1], pathlib.Path(sys.argv[2]), int(seed)))
