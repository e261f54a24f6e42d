"""Where a run's numbers go: one JSON line a step, and TensorBoard."""

import json
import os
import pathlib
import time

import tensorboardX


class MetricWriter:
    """Appends to `metrics.jsonl` (one write a line, so that a kill cannot tear one) and to `tensorboard/`."""

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        self._path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = {"step": step, "time": time.time()} | metrics
        os.write(self._file, (json.dumps(line) + "\n").encode())
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()
        os.close(self._file)
