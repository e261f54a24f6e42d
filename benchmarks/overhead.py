"""What telling of a step costs: the log, TensorBoard, the ledger, and what the program computes for them.

    python -m benchmarks.overhead --run runs/shapes     # two minutes; results/overhead.json

Telling is timed alone, on a step's numbers as the device gives them. What the program computes more (norms of
the groups, update ratio, losses of the groups) is the difference of two programs, in turns. The limit asked for
is 1 %.
"""

import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import tqdm

from benchmarks.step import run, timed
from irg_jax.config import TrainConfig
from irg_jax.parallel.hosts import Hosts
from irg_jax.training.metrics import EventLog, MetricWriter, Progress
from irg_jax.training.step import make_step
from irg_jax.training.trainer import Trainer

STEPS, TOLD = 12, 300
KEPT = ("loss", "ce", "mse", "tokens", "grad_norm", "finite")    # what was told before


def tell_seconds(trainer: Trainer, metrics: Mapping[str, Any], folder: pathlib.Path) -> float:
    """The mean of a step's telling."""
    config = trainer.config
    writer = MetricWriter(folder, config, first_step=0)
    progress = Progress(tqdm.tqdm(disable=True), writer, EventLog(folder), config=config,
                        records=trainer.data.records, ledger=trainer.ledger, peak_share=1.0)
    begun = time.perf_counter()
    for step in range(TOLD):
        progress.tell_previous(step, metrics, trainer.data_counters(0))
    seconds = time.perf_counter() - begun
    writer.close()
    return seconds / TOLD


def measure(config: TrainConfig, workdir: pathlib.Path) -> dict[str, Any]:
    trainer = Trainer(config, workdir, Hosts())
    trainer.load()
    batches = [trainer.put(trainer.next_batch()) for _ in range(STEPS)]
    trainer.data.close()
    trainer.bundles.close()
    whole = make_step(trainer.model, trainer.vae, config.step_config())

    def less(*arguments):
        state, metrics = whole(*arguments)
        return state, {name: metrics[name] for name in KEPT}    # what nobody reads is not computed
    with jax.set_mesh(trainer.mesh):
        programs = [jax.jit(program) for program in (whole, less)]
        arguments = lambda batch: (trainer.state, trainer.vae_params, batch)
        metrics = [jax.block_until_ready(program(*arguments(batches[0])))[1] for program in programs][0]
        seconds = lambda program, batch: timed(lambda: jax.block_until_ready(program(*arguments(batch))))
        pairs = [[seconds(program, batch) for program in programs] for batch in batches]
    step = statistics.median(one for one, _ in pairs)
    computed = statistics.median(one - other for one, other in pairs)
    told = tell_seconds(trainer, metrics, workdir / "told")
    return {"step_seconds": step, "tell_seconds": told, "computed_seconds": computed, "numbers": len(metrics),
            "tell_share": told / step, "computed_share": computed / step, "limit_share": 0.01}


if __name__ == "__main__":
    run("overhead", measure, "numpy", "jax", "tensorboardX")
