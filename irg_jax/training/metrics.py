"""Where a run's numbers go: the progress bar, one JSON line a step, and TensorBoard."""

import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import tensorboardX
import tqdm

_NAMED = 50    # records of a skipped step


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


class Progress:
    """Tells of a run's steps, one after the other. Skipped ones are counted; too many in a row end the run."""

    def __init__(self, bar: tqdm.tqdm, writer: MetricWriter | None, *, log_every: int, max_skipped: int,
                 records: Callable[[int], list[str]]):
        """Args: writer is the first host's; records names what a step held."""
        self._bar, self._writer, self._records = bar, writer, records
        self._log_every, self._max_skipped = log_every, max_skipped
        self._clock, self._skipped, self._in_a_row = time.perf_counter(), 0, 0

    def tell(self, step: int, metrics: Mapping[str, Any], data: Mapping[str, float]) -> None:
        """Waits for a step's metrics and writes its line; a skipped step has none.

        Raises: FloatingPointError if this is the last skipped step in a row that is allowed.
        """
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._bar.update()
        if not values.pop("finite"):
            self._skip(step, values)
            return
        self._in_a_row = 0
        values |= {"tokens_per_second": values.pop("tokens") / seconds, "step_seconds": seconds,
                   "skipped_steps": self._skipped, **data}
        if self._writer and step % self._log_every == 0:
            self._writer.write(step, values)
        self._bar.set_postfix(ce=f"{values['ce']:.3f}", mse=f"{values['mse']:.4f}", refresh=False)

    def _skip(self, step: int, values: Mapping[str, float]) -> None:
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        names = self._records(step)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        held = f"it held {', '.join(names[:_NAMED])}{more}"
        logging.warning("step %d changed nothing: loss is %g (ce %g, mse %g), the gradient's norm %g; %s",
                        step, *(values[name] for name in ("loss", "ce", "mse", "grad_norm")), held)
        if self._in_a_row == self._max_skipped:
            first = step - self._in_a_row + 1
            raise FloatingPointError(
                f"loss or gradient was not finite in {self._in_a_row} steps in a row (max_skipped): loss is "
                f"{values['loss']:g} at step {step}; {held}. Look at these records, or lower the rate. "
                f"The last checkpoint is from before step {first}, and nothing has changed since that step")
