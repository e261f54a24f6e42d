"""One training step of the miniature: seconds, tokens, and matmul work against what the machine can do.

    bash launch/local.sh                            # once: it makes the records
    python -m benchmarks.step --run runs/shapes     # a minute; results/step.json

Times steps of `configs/shapes_stage2.py` on batches that are ready, from the base checkpoint. Prints one JSON
object. The limit is the rate of one large float32 matmul on the same device, measured in the same run; work is
counted over all slots of a pack, padding included.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import machine
from configs import shapes_stage2
from data_pipelines import command
from data_pipelines.batch import PackedBatch
from data_pipelines.config import from_config_dict
from irg_jax.checkpoints.model import load_model
from irg_jax.config import TrainConfig
from irg_jax.models.config import ModelConfig
from irg_jax.parallel.hosts import Hosts
from irg_jax.training.trainer import Trainer

STEPS = 20
SIDE = 2048    # of the large matmul


def stage(run: pathlib.Path) -> TrainConfig:
    config = shapes_stage2.get_config()
    config.init_from, config.data.source = str(run / "base"), str(run / "data")
    config.data.moments = str(run / "moments")
    return from_config_dict(TrainConfig, config)


def matmul_flops(model: ModelConfig, batch: PackedBatch) -> float:
    """Floating-point operations of all matmuls of a step, forward and backward, as if nothing were frozen."""
    llm, vit = model.llm, model.vit
    packs, text = batch.text_ids.shape
    patches, latents = batch.vit_patches.shape[1], batch.latent_position.shape[1]
    size = llm.head_dim
    expert = llm.hidden_size * (2 * size * (llm.num_attention_heads + llm.num_key_value_heads)
                                + 3 * llm.intermediate_size)
    encoder = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    weights = (llm.num_hidden_layers * expert * (text + patches + latents)
               + model.num_vit_layers * encoder * patches + llm.hidden_size * llm.vocab_size * text)
    # Two matmuls forward, five backward: scores are computed again.
    pairs = llm.num_hidden_layers * llm.num_attention_heads * size * (text + patches + latents) ** 2
    pairs += model.num_vit_layers * vit.hidden_size * patches ** 2
    return packs * (6.0 * weights + 14.0 * pairs)


def matmul_rate() -> float:
    """Operations a second of a large float32 matmul."""
    square = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    return 2.0 * SIDE**3 / min(timed(lambda: product(square, square).block_until_ready()) for _ in range(5))


def timed(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(config: TrainConfig, workdir: pathlib.Path) -> dict[str, Any]:
    trainer = Trainer(config, workdir, Hosts())
    trainer.load()
    batches = [next(trainer.data) for _ in range(STEPS)]
    trainer.data.close()
    trainer.bundles.close()

    def step(batch):
        return int(trainer.advance(batch)["tokens"])   # when they are there
    with jax.set_mesh(trainer.mesh):
        compile_seconds = timed(lambda: step(batches[0]))
        seconds = statistics.median(timed(lambda: step(batch)) for batch in batches)
        tokens = statistics.mean(map(step, batches))
    slots = sum(rows.last.size for rows in (batches[0].text_rows, batches[0].vit_rows, batches[0].latent_rows))
    work, limit = matmul_flops(load_model(config.init_from).config, batches[0]), matmul_rate()
    return {"step_seconds": seconds, "first_step_seconds": compile_seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds, "fill": tokens / slots, "matmul_gflop": work / 1e9,
            "gflops": work / seconds / 1e9, "limit_gflops": limit / 1e9, "of_limit": work / seconds / limit}


def run(benchmark: str, measure: Callable[[TrainConfig, pathlib.Path], dict[str, Any]], *packages: str) -> None:
    """A benchmark of stage 2 on what local.sh has made, as a command."""
    def main(values: Any) -> None:
        result = {"benchmark": benchmark, "device": jax.devices()[0].device_kind, **machine.describe(*packages)}
        with tempfile.TemporaryDirectory() as name:
            result |= measure(stage(pathlib.Path(values.run)), pathlib.Path(name))
        machine.keep(result, values.out)
    flags.DEFINE_string("run", "runs/shapes", "A folder of launch/local.sh.")
    flags.DEFINE_string("out", str(machine.RESULTS / f"{benchmark}.json"), "The result file.")
    command.run(main)


if __name__ == "__main__":
    run("step", measure, "numpy", "jax", "flax", "optax")
