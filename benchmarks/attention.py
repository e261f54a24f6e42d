"""Attention over planned IRGL packs: the tiles that are visited over the exact work, and the speed of it.

    python -m benchmarks.attention            # two minutes anywhere; on a GPU or TPU it is timed too

Packs are planned from the simulated lengths of `data_pipelines/simulation.py` under the budgets of
configs/irgl_stage{1,2}.py. The limit of `visited` is 1: every pair that is computed is visible. What is
useful are the visible pairs: 4 H floating-point operations a pair and head forwards, 10 H backwards (five
matmuls; scores are computed again). `timed` is empty on a CPU. Prints one JSON object last and writes it to
benchmarks/results/attention.json.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import flex, machine
from data_pipelines import command
from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.config import DataConfig, from_config_dict, load_config
from data_pipelines.planning import Planner
from data_pipelines.simulation import simulate
from irg_jax.kernels.attention import attend, look
from irg_jax.models.vision import own_images
from irg_jax.training.planned import RECORDS, count_pairs, count_tiles, lay_out, rows_together

TILES = (128, 256, 512, 1024)
HEADS, KEY_HEADS, SIZE = 28, 4, 128     # of the 7B
MATMUL = 8192                           # side of the matmul whose rate is the limit
REPEATS = 5


def packs_of(stage: int, count: int) -> list[PackedBatch]:
    """Packs as training has them, but that their words and pixels are zeros."""
    config = from_config_dict(DataConfig, load_config(f"configs/irgl_stage{stage}.py").data)
    tables = simulate(config, records=RECORDS)
    planner = Planner(config, tables)
    return [lay_out(planner[index], config, tables)
            for index in tqdm(range(count), f"stage {stage}", leave=False, disable=None)]


def visited_ratio(packs: list[Rows], tile: int) -> float:
    """Pairs in visited tiles over visible pairs."""
    return sum(count_tiles(rows, tile) for rows in packs) * tile**2 / sum(map(count_pairs, packs))


def of_llm(pack: PackedBatch) -> Rows:
    return rows_together(pack.text_rows, pack.vit_rows, pack.latent_rows)


def of_vit(pack: PackedBatch) -> Rows:
    return rows_together(own_images(pack.vit_rows))


def measure_visits(packs: list[PackedBatch]) -> dict[str, Any]:
    result = {}
    for name, of_layers in (("llm", of_llm), ("vit", of_vit)):
        rows = [of_layers(pack) for pack in packs]
        density = np.mean([count_pairs(row) / row.order.size**2 for row in rows])
        result[name] = {"slots": rows[0].order.size, "density": round(float(density), 4),
                        "visited": {str(tile): round(visited_ratio(rows, tile), 4) for tile in TILES}}
    return result


def seconds_of(function, *arguments) -> float:
    """The median of some runs, after one that compiles."""
    jax.block_until_ready(function(*arguments))

    def once() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - begun
    return statistics.median(once() for _ in range(REPEATS))


def matmul_tflops(dtype: jnp.dtype = jnp.bfloat16, side: int = MATMUL) -> float:
    """The rate of one large matmul: the limit."""
    square = jnp.ones((side, side), dtype)
    return 2e-12 * side**3 / seconds_of(jax.jit(jnp.matmul), square, square)


def time_attention(function, heads: list[jax.Array], pairs: float) -> dict[str, float]:
    """Milliseconds and useful TFLOP/s of attention and of its backward pass alone."""
    whole = jax.jit(lambda *heads: jax.vjp(function, *heads)[1](heads[0]))
    forward = seconds_of(jax.jit(function), *heads)
    return rates(forward, seconds_of(whole, *heads) - forward, pairs)


def rates(forward: float, backward: float, pairs: float) -> dict[str, float]:
    work = 1e-12 * HEADS * SIZE * pairs
    return {"forward_ms": round(1e3 * forward, 2), "backward_ms": round(1e3 * backward, 2),
            "forward_tflops": round(4 * work / forward, 1), "backward_tflops": round(10 * work / backward, 1)}


def measure_speed(pack: PackedBatch) -> dict[str, Any]:
    """Each implementation over one pack, cuDNN over as many tokens of one causal sequence, one matmul.

    Where torch sees a GPU, its FlexAttention runs under the same rule, and its results are compared with ours.
    """
    rows = of_llm(pack)
    pairs, slots = count_pairs(rows), rows.order.size
    keys = jax.random.split(jax.random.key(0), 3)
    heads = [jax.random.normal(key, (1, slots, count, SIZE), jnp.bfloat16)
             for key, count in zip(keys, (HEADS, KEY_HEADS, KEY_HEADS))]
    sight = jax.jit(look)(*[jax.tree.map(lambda row: jnp.asarray(row)[None], rows)] * 2)
    ours = lambda implementation: lambda *heads: attend(*heads, sight, implementation)
    cases = {name: (ours(name), pairs) for name in ("auto", "xla")}
    if jax.default_backend() == "gpu":
        causal = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        cases["cudnn_causal"] = (causal, slots * (slots + 1) / 2)
    result = {"matmul_tflops": round(matmul_tflops(), 1),
              **{name: time_attention(function, heads, work) for name, (function, work) in cases.items()}}
    if flex.is_here():
        timed = flex.time_flex(rows, [np.asarray(x[0], np.float32) for x in heads], seconds_of)
        result["flex_attention"] = rates(timed["forward"], timed["backward"], pairs)
        apart = np.abs(timed["out"] - np.asarray(jax.jit(ours("auto"))(*heads)[0], np.float32))
        result["largest_difference_from_flex"] = float(apart[rows.last >= 0].max())
    return result


def main(values: Any) -> None:
    result = {"benchmark": "attention", "device": jax.devices()[0].device_kind,
              **machine.describe("numpy", "jax"), "packs": values.packs, "visited": {}, "timed": {}}
    for stage in (1, 2):
        packs = packs_of(stage, values.packs)
        result["visited"][f"stage{stage}"] = measure_visits(packs)
        if jax.default_backend() != "cpu":
            result["timed"][f"stage{stage}"] = measure_speed(packs[0])
    machine.keep(result, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("packs", 20, "Packs of each stage, for the tiles.")
    flags.DEFINE_string("out", str(machine.RESULTS / "attention.json"), "The result file.")
    command.run(main)
