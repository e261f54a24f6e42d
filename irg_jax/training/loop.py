"""The loop: fetch, step, log, save, until the last step or a signal."""

import contextlib
import logging
import pathlib
from collections.abc import Collection
from typing import Protocol

import jax
import tqdm
from PIL import Image

from irg_jax.checkpoints.bundle import FOLDER as BUNDLES
from irg_jax.checkpoints.model import Model
from irg_jax.checkpoints.seals import set_bad_aside
from irg_jax.config import TrainConfig
from irg_jax.parallel.hosts import Hosts
from irg_jax.training.goodput import TRAINING
from irg_jax.training.guards import Watchdog, claim
from irg_jax.training.interrupt import Interrupt
from irg_jax.training.metrics import EventLog, MetricWriter, Progress
from irg_jax.training.profiling import Profiler
from irg_jax.training.resuming import write_config
from irg_jax.training.trainer import Trainer, name_devices


class Draw(Protocol):
    """What draws the EMA for people to look at."""

    def check(self, model: Model) -> None:
        """Raises: ValueError if it cannot draw with such a model, whose `params` may be empty."""

    def __call__(self, model: Model, step: int) -> Image.Image: ...



def train(config: TrainConfig, workdir: pathlib.Path, hosts: Hosts | None = None, *,
          accepted: Collection[str] = (), draw: Draw | None = None, interrupt: Interrupt | None = None) -> int:
    """Runs a stage to its last step, or to a signal; returns the step reached.

    Args:
        hosts: all processes of the run; the first of them writes logs and prints.
        accepted: config fields that may have changed since the stage was begun.
        draw: called on the first host, every `draw_every` steps and at the end; not again for a stage that was
            saved at its last step, drawn or not.
        interrupt: of a run of several stages, which asks it after each.
    Raises: ValueError for anything wrong with config, data or checkpoints, before the first step, and if a
        checkpoint cannot be written; FloatingPointError if loss or gradient is not finite in `max_skipped`
        steps in a row.
    """
    hosts, folder = hosts or Hosts(), workdir / config.stage
    with contextlib.ExitStack() as closing:
        begun, aside = hosts.is_first and folder.is_dir(), []
        with hosts.together():
            if begun:
                closing.enter_context(claim(folder))
                aside = set_bad_aside(folder / BUNDLES)
        for sentence in aside:
            logging.error("%s", sentence)
        with hosts.together() as facts:
            trainer = Trainer(config, workdir, hosts, accepted)
            closing.enter_context(contextlib.closing(trainer.data))
            facts |= trainer.facts()
            if draw:
                draw.check(trainer.source)
        with hosts.together():
            if hosts.is_first and not begun:    # what is refused leaves no folder
                closing.enter_context(claim(folder))
        trainer.events = closing.enter_context(EventLog(folder if hosts.is_first else None))
        for sentence in aside:
            trainer.events.write("set aside", trainer.start, sentence)
        interrupt = closing.enter_context((interrupt or Interrupt(hosts)).listen())
        closing.enter_context(hosts.watching())
        closing.enter_context(jax.set_mesh(trainer.mesh))
        if trainer.start >= config.total_steps:
            tell(hosts, f"{trainer.folder}: already at step {trainer.start} of {config.total_steps}")
            return trainer.start
        with Watchdog(config.hang_seconds).watching() as watchdog:
            trainer.load()
            watchdog.progress()
            try:
                step = fit(trainer, interrupt, watchdog, draw)
            except OSError as error:    # of logs; what else can fail tells it in its own words
                raise ValueError(f"{folder} cannot be written: {error}") from error
    if step < config.total_steps:
        tell(hosts, f"{trainer.folder}: stopped and saved at step {step}; the same command resumes")
    return step


def tell(hosts: Hosts, sentence: str) -> None:
    """Prints what concerns all hosts once."""
    if hosts.is_first:
        print(sentence, flush=True)


def fit(trainer: Trainer, interrupt: Interrupt, watchdog: Watchdog, draw: Draw | None) -> int:
    """Steps, and the last checkpoint; the first of the hosts keeps the log."""
    config, events, writer = trainer.config, trainer.events, None
    with contextlib.ExitStack() as closing:
        closing.callback(trainer.bundles.close)
        if trainer.hosts.is_first:
            write_config(trainer.folder, config)
            writer = closing.enter_context(
                contextlib.closing(MetricWriter(trainer.folder, config, first_step=trainer.start)))
        events.write("resume" if trainer.start else "start", trainer.start, name_devices())
        for sentence in trainer.changes:
            logging.warning("%s", sentence)
            events.write("config", trainer.start, sentence)
        trainer.tell_planned()
        bar = tqdm.tqdm(total=config.total_steps, initial=trainer.start, desc=config.stage, unit="step",
                        mininterval=1.0, disable=writer is None)
        closing.callback(bar.close)
        progress = Progress(bar, writer, events, config=config, records=trainer.data.records,
                            ledger=trainer.ledger, peak_share=trainer.seconds_at_peak())
        profiler = closing.enter_context(contextlib.closing(Profiler(trainer.folder / "profile", config)))
        with trainer.ledger.spend(TRAINING):
            step = run_steps(trainer, progress, interrupt, watchdog, profiler, draw)
            trainer.save(step)
        ended = "end" if step == config.total_steps else "signal"
        events.write(ended, step, f"goodput {trainer.ledger.goodput:.3f}")
    return step


def run_steps(trainer: Trainer, progress: Progress, interrupt: Interrupt, watchdog: Watchdog,
              profiler: Profiler, draw: Draw | None) -> int:
    """The loop itself. Metrics of a step are read after the next one is dispatched, so that reading
    them never stalls the device; saving comes after the step whose data it counts."""
    config, step = trainer.config, trainer.start
    phases = {phase.from_step: phase.name for phase in config.phases}
    while step < config.total_steps and not interrupt.reached():
        if step in phases:
            trainer.enter(step)
            trainer.events.write("phase", step, phases[step])
        profiler.before(step)
        metrics = trainer.advance(trainer.next_batch())
        progress.tell_previous(step, metrics, trainer.data_counters(step))
        step += 1
        if step % config.save_every == 0 or step == config.total_steps:
            trainer.save(step)    # before it is drawn, which can fail
        if draw and (step == config.total_steps or config.draw_every and step % config.draw_every == 0):
            with progress.paused():
                if picture := trainer.draw(draw, step):
                    progress.show(step, picture)
        watchdog.progress()
    with progress.paused():    # the last step is told of
        return step
