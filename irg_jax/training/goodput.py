"""Where the time of a run went, over all its lives: training, and what was not training."""

import collections
import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

TRAINING = "training"
WRITE_SECONDS = 30.0


class Ledger:
    """Seconds by what they were spent on; at any moment it is one thing.

    Beside what is told to it there are "lost", steps that a kill undid, up to the last that the log knows of,
    and "away", from the last line of the log to the next start. It is kept in checkpoints, and in
    STAGE/goodput.json for the reader.
    """

    def __init__(self, path: pathlib.Path | None):
        """Args: path is of the file, of the first host alone."""
        self._path, self._written = path, 0.0
        self._seconds, self._starts = collections.Counter(), 1
        self._kind, self._since = "starting", time.perf_counter()
        self._log: pathlib.Path | None = None

    def resume(self, saved: Mapping[str, Any], log: pathlib.Path, step: int) -> None:
        """Goes on from a checkpoint's ledger, and adds what the log knows of since `step`."""
        self._log = log
        self._seconds.update(saved.get("seconds", {}))
        self._starts += saved.get("starts", 0)
        before = step - 1
        for line in read_lines(log, begin=saved.get("log_bytes", 0)):
            if line["step"] < step:    # told of after it was saved
                continue
            if line["step"] <= before:    # in another life
                before = step - 1
            # Not every step has a line.
            self._seconds["lost"] += line["step_seconds"] * (line["step"] - before)
            before = line["step"]
        if lines := read_lines(log):
            self._seconds["away"] += max(time.time() - lines[-1]["time"] - self._seconds["starting"], 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        before = self._turn_to(kind)
        try:
            yield
        finally:
            self._turn_to(before)

    def _turn_to(self, kind: str) -> str:
        now, before = time.perf_counter(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @property
    def goodput(self) -> float:
        """Share of the time since the first start that was training."""
        self._turn_to(self._kind)
        return self._seconds[TRAINING] / max(self._seconds.total(), 1e-9)

    def state(self) -> dict[str, Any]:
        goodput = self.goodput
        known = self._log.stat().st_size if self._log and self._log.exists() else 0
        return {"seconds": {kind: round(value, 3) for kind, value in sorted(self._seconds.items()) if value},
                "goodput": round(goodput, 4), "starts": self._starts, "log_bytes": known}

    def write(self, *, now: bool = False) -> None:
        """Writes the file, if it is old or `now`."""
        if self._path and (now or time.perf_counter() - self._written > WRITE_SECONDS):
            self._written = time.perf_counter()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.state(), indent=1) + "\n")
            partial.replace(self._path)


def read_lines(path: pathlib.Path, *, begin: int = 0) -> list[dict[str, Any]]:
    """The lines of a log, from a byte on, that tell of a step, its time and its seconds.

    A kill may have torn the last one, and the log may be the work of anyone.
    """
    lines = []
    for text in path.read_bytes()[begin:].splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if (isinstance(line, dict) and type(line.get("step")) is int
                and all(_is_sound(line.get(name)) for name in ("step", "time", "step_seconds"))):
            lines.append(line)
    return lines


def _is_sound(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12    # which NaN is not
