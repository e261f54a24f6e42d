"""What approximations of drawing cost, for the time they save: grey levels, and prompts drawn right.

    bash launch/local.sh                                  # once: it makes the model and the prompts
    python -m benchmarks.approximate --run runs/shapes    # twenty minutes; results/approximate.json

Held-out prompts in two turns, by the settings of configs/shapes_generate.py and by others that differ in one
thing. First pictures have the same noise whatever the settings, so where the first thought is the same, too
(`same_thoughts`: rounded weights may write another), `difference` is the mean difference of grey levels of
first pictures from those of ten times as many steps by Euler's method, with exact weights. `computed` steps of
a pair run the network. `seconds` is the drawing of both turns alone, without the first batch, which compiles.
Prints one JSON object last.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import machine
from configs import shapes_generate
from data_pipelines import command
from data_pipelines.config import from_config_dict
from data_pipelines.shapes.score import score
from irg_jax.evaluation.shapes import HeldOut, read_prompts
from irg_jax.evaluation.statistics import paired_bootstrap
from irg_jax.models.quantized import DTYPES
from irg_jax.sampling.config import FlowConfig, SamplingConfig
from irg_jax.sampling.flow import timesteps
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.opening import in_batches, load_generator
from irg_jax.sampling.taylorseer import plan_steps
from irg_jax.sampling.trajectory import Generator, Turn

REFERENCE = 10    # times as many steps
VARIANTS = {"as configured": {}, "euler, 13 points": {"num_timesteps": 13},
            "adams, 13 points": {"num_timesteps": 13, "solver": "adams"},
            "adams, 9 points": {"num_timesteps": 9, "solver": "adams"},
            "taylorseer": {"enable_taylorseer": True, "taylorseer_order": 2},
            "taylorseer, order 1": {"enable_taylorseer": True, "taylorseer_order": 1},
            "taylorseer, order 1, first 3": {"enable_taylorseer": True, "taylorseer_order": 1,
                                             "taylorseer_first": 3},
            "taylorseer, order 1, adams": {"enable_taylorseer": True, "taylorseer_order": 1, "solver": "adams"},
            **{f"{dtype} weights": {"weights": dtype} for dtype in DTYPES}}


def change(config: SamplingConfig, weights: str | None = None, **fields: Any) -> SamplingConfig:
    """The same with these settings in both turns."""
    return dataclasses.replace(config, weights=weights, turn1=dataclasses.replace(config.turn1, **fields),
                               turn2=dataclasses.replace(config.turn2, **fields))


class Timed:
    """A generator whose drawing is waited for and timed."""

    def __init__(self, generator: Generator):
        self._draw, self.seconds = generator.draw_latent, 0.0
        generator.draw_latent = self

    def __call__(self, *arguments: Any, **settings: Any) -> jax.Array:
        begun = time.perf_counter()
        latent = jax.block_until_ready(self._draw(*arguments, **settings))
        self.seconds += time.perf_counter() - begun
        return latent


def draw(run: pathlib.Path, config: SamplingConfig, prompts: Sequence[HeldOut], *, num_turns: int,
         bar: tqdm) -> tuple[list[Turn], np.ndarray, float]:
    """First turns, verdicts [prompts, turns], seconds but for the first batch."""
    generator, _ = load_generator(str(run / "stage2"), config, prompts={})
    timed, firsts, verdicts, first = Timed(generator), [], [], 0.0
    for batch, padded in in_batches(range(len(prompts)), config.batch_size):
        drawn = trajectories(generator, [prompts[i].prompt for i in padded], seeds=padded, num_turns=num_turns)
        firsts += [turns[0] for turns, _ in zip(drawn, batch)]
        verdicts += [[score(prompts[i].request, turn.image).correct for turn in turns]
                     for i, turns in zip(batch, drawn)]
        first = first or timed.seconds
        bar.update(len(batch))
    return firsts, np.array(verdicts), timed.seconds - first


def computed_steps(flow: FlowConfig) -> int:
    """Those that run the network."""
    if not flow.enable_taylorseer:
        return flow.num_timesteps - 1
    return int(plan_steps(timesteps(flow), [1] * (flow.num_timesteps - 1), flow).is_computed.sum())


def main(values: Any) -> None:
    run = pathlib.Path(values.run)
    config = from_config_dict(SamplingConfig, shapes_generate.get_config())
    prompts = read_prompts(run / "data" / "prompts_heldout.jsonl", limit=values.prompts)
    about = {"benchmark": "approximate", "device": jax.devices()[0].device_kind, "prompts": len(prompts),
             **machine.describe("jax", "flax", "numpy")}
    bar = tqdm(total=len(prompts) * (1 + len(VARIANTS)), unit="prompt", disable=None)
    fine = change(config, num_timesteps=REFERENCE * (config.turn1.num_timesteps - 1) + 1)
    truth, _, _ = draw(run, fine, prompts, num_turns=1, bar=bar)
    rows, before = {}, None
    for name, fields in VARIANTS.items():
        varied = change(config, **fields)
        turns, verdicts, seconds = draw(run, varied, prompts, num_turns=2, bar=bar)
        same = [(turn, exact) for turn, exact in zip(turns, truth) if turn.text == exact.text]
        before = verdicts if before is None else before
        second = paired_bootstrap(verdicts[:, 1], before[:, 1], seed=0)
        rows[name] = {
            "difference": float(np.mean([turn.change(exact) for turn, exact in same])),
            "same_thoughts": len(same) / len(turns),
            "computed": computed_steps(varied.turn1) + computed_steps(varied.turn2),
            "turn1": float(verdicts[:, 0].mean()), "turn2": float(verdicts[:, 1].mean()),
            "turn2_minus_configured": dataclasses.asdict(second), "seconds": seconds}
    bar.close()
    machine.keep(about | {"variants": rows}, values.out)


if __name__ == "__main__":
    flags.DEFINE_string("run", "runs/shapes", "A folder of launch/local.sh.")
    flags.DEFINE_integer("prompts", None, "Only the first so many.", lower_bound=51)
    flags.DEFINE_string("out", str(machine.RESULTS / "approximate.json"), "The result file.")
    command.run(main)
