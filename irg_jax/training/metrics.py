"""Where a run's numbers go: the progress bar, one JSON line a step, TensorBoard, Weights & Biases, and events.

STAGE/metrics.jsonl has a line a step, STAGE/events.jsonl one for everything that is not a step: starts,
signals, skipped steps, bad records, checkpoints set aside, phases, changes of the config.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from PIL import Image

from irg_jax.config import TrainConfig
from irg_jax.parallel.compiling import GIB
from irg_jax.training.goodput import Ledger

LOG, EVENTS = "metrics.jsonl", "events.jsonl"
_NAMED = 50    # records of a skipped step


class LineFile:
    """JSON lines, each appended by one write: neither a kill nor a full disk tears one in two."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        written = os.write(self._file, data)
        if written < len(data):    # what the disk still took; the next write would say no more than this
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._file)


class EventLog:
    """What happened beside the steps; without a folder, of no interest."""

    def __init__(self, folder: pathlib.Path | None):
        self._file = LineFile(folder / EVENTS) if folder else None

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()

    def write(self, event: str, step: int | None, text: str) -> None:
        if self._file:
            self._file.write({"time": time.time(), "step": step, "event": event, "text": text})


class MetricWriter:
    """`metrics.jsonl` and `tensorboard/`; Weights & Biases too if the config says so."""

    def __init__(self, folder: pathlib.Path, config: TrainConfig, *, first_step: int):
        self._file = LineFile(folder / LOG)
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._wandb = open_wandb(folder, config) if config.wandb else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write({"step": step, "time": time.time()} | metrics)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def draw(self, step: int, picture: Image.Image) -> None:
        self._board.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def open_wandb(folder: pathlib.Path, config: TrainConfig) -> Any:
    """One run a stage folder, however often it is resumed; offline, `wandb sync` sends it later."""
    import wandb  # not a requirement, and slow to import
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project="irg_jax", id=name, resume="allow", mode=config.wandb, dir=str(folder),
                      name=f"{folder.parent.name}/{folder.name}", config=dataclasses.asdict(config))


class Progress:
    """Tells of a run's steps, one after the other. Skipped ones are counted; too many in a row end the run."""

    def __init__(self, bar: tqdm.tqdm, writer: MetricWriter | None, events: EventLog, *, config: TrainConfig,
                 records: Callable[[int], list[str]], ledger: Ledger, peak_share: float | None):
        """Args:
            writer: the first host's.
            records: names what a step held.
            peak_share: seconds that a step's useful operations take at the devices' peak; None if unknown.
        """
        self._bar, self._writer, self._events, self._records = bar, writer, events, records
        self._config, self._ledger, self._peak_share = config, ledger, peak_share
        self._clock, self._skipped, self._in_a_row, self._pending = time.perf_counter(), 0, 0, None

    def tell_previous(self, *step: Any) -> None:
        """`tell` of the step before this one, whose arguments these are: by now it is done."""
        if self._pending is not None:
            self.tell(*self._pending)
        self._pending = step

    def show(self, step: int, picture: Image.Image) -> None:
        if self._writer:
            self._writer.draw(step, picture)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something that is no step: all steps are told of before it, and it counts to none of them."""
        if self._pending is not None:
            self.tell(*self._pending)
            self._pending = None
        yield
        self._clock = time.perf_counter()

    def tell(self, step: int, metrics: Mapping[str, Any], data: Mapping[str, float]) -> None:
        """Waits for a step's metrics and writes its line; a skipped step has none.

        Raises: FloatingPointError if this is the last skipped step in a row that is allowed.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # Of a group without loss tokens in this step there is nothing to tell.
        values = {name: value for name, value in values.items() if "/" not in name or not math.isnan(value)}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._bar.update()
        if not values.pop("finite"):
            self._skip(step, values)
            return
        self._in_a_row = 0
        values |= {"tokens_per_second": values.pop("tokens") / seconds, "step_seconds": seconds,
                   "skipped_steps": self._skipped, "goodput": self._ledger.goodput, **data, **measure_memory()}
        if self._peak_share:
            values["mfu"] = self._peak_share / seconds
        if self._writer and step % self._config.log_every == 0:
            self._writer.write(step, values)
        self._ledger.write()
        shown = {"ce": f"{values['ce']:.3f}", "mse": f"{values['mse']:.4f}"}
        shown |= {"mfu": f"{values['mfu']:.1%}"} if "mfu" in values else {}
        self._bar.set_postfix(shown, refresh=False)

    def _skip(self, step: int, values: Mapping[str, float]) -> None:
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        names = self._records(step)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        held = f"it held {', '.join(names[:_NAMED])}{more}"
        told = (f"loss is {values['loss']:g} (ce {values['ce']:g}, mse {values['mse']:g}), the gradient's norm "
                f"{values['grad_norm']:g}; {held}")
        logging.warning("step %d changed nothing: %s", step, told)
        self._events.write("skipped step", step, told)
        if self._in_a_row == self._config.max_skipped:
            first = step - self._in_a_row + 1
            raise FloatingPointError(
                f"loss or gradient was not finite in {self._in_a_row} steps in a row (max_skipped): loss is "
                f"{values['loss']:g} at step {step}; {held}. Look at these records, or lower the rate. "
                f"Parameters are those of before step {first}, also in a checkpoint that was saved since")


def measure_memory() -> dict[str, float]:
    """The most that this host's first device has held, where it tells: {"hbm_gib": ...}."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"hbm_gib": stats["peak_bytes_in_use"] / GIB} if "peak_bytes_in_use" in stats else {}
