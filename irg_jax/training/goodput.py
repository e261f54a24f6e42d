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

    Beside what is told to it there are "lost", steps that a kill undid, and "away", from the last line of the
    log to the next start. It is kept in checkpoints, and in STAGE/goodput.json for the reader.
    """

    def __init__(self, path: pathlib.Path | None):
        """Args: path is of the file, of the first host alone."""
        self._path, self._written = path, 0.0
        self._seconds, self._starts = collections.Counter(), 1
        self._kind, self._since = "starting", time.perf_counter()

    def resume(self, saved: Mapping[str, Any], log: pathlib.Path, step: int) -> None:
        """Goes on from a checkpoint's ledger, and adds what the log knows of since `step`."""
        self._seconds.update(saved.get("seconds", {}))
        self._starts += saved.get("starts", 0)
        lines = read_lines(log)
        self._seconds["lost"] += sum(line.get("step_seconds", 0.0) for line in lines if line["step"] >= step)
        if lines:
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
        return {"seconds": {kind: round(value, 3) for kind, value in sorted(self._seconds.items()) if value},
                "goodput": round(goodput, 4), "starts": self._starts}

    def write(self, *, now: bool = False) -> None:
        """Writes the file, if it is old or `now`."""
        if self._path and (now or time.perf_counter() - self._written > WRITE_SECONDS):
            self._written = time.perf_counter()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.state(), indent=1) + "\n")
            partial.replace(self._path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a log that tell of a step and a time; a kill may have torn the last one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines += [line] if {"step", "time"} <= line.keys() else []
        except (ValueError, AttributeError):
            continue
    return lines
