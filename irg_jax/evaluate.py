r"""Draws a benchmark's prompts with the base model and the trained one, and scores every image.

    python -m irg_jax.evaluate --benchmark shapes --config configs/shapes_generate.py \
        --base runs/shapes/base --checkpoint runs/shapes/stage2 \
        --prompts runs/shapes/data/prompts_heldout.jsonl --out runs/shapes/eval/shapes

Four systems draw each prompt from the same noise: `base` (the base model, plainly), `self_cot` (the
base model, which thinks first), `turn1` and `turn2` (the trained model); with --turns it goes on to
`turn3` and further. OUT/results.jsonl has a line an image; OUT/manifest.json, written last, says how
they came to be. Interrupted, the same command draws only what is missing.
"""

import functools
import platform
import shlex
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.evaluation.recording import Recorder
from irg_jax.evaluation.shapes import HeldOut, digest_prompts, make_result, read_prompts
from irg_jax.parallel.sharding import find_mesh
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import describe_settings, in_batches, load_generator
from irg_jax.sampling.trajectory import Generator, Turn


def draw_base(generator: Generator, prompts: list[str], seeds: list[int]) -> dict[str, list[Turn]]:
    """What the base model draws, plainly and after thinking."""
    thought = generator.trajectories(prompts, seeds=seeds, num_turns=1)
    return {"base": generator.text_to_image(prompts, seeds=seeds),
            "self_cot": [turns[0] for turns in thought]}


def draw_trained(generator: Generator, prompts: list[str], seeds: list[int], num_turns: int
                 ) -> dict[str, list[Turn]]:
    """All turns of the trained model."""
    drawn = generator.trajectories(prompts, seeds=seeds, num_turns=num_turns)
    # One that ended early stays with its last image.
    return {f"turn{number + 1}": [turns[min(number, len(turns) - 1)] for turns in drawn]
            for number in range(num_turns)}


def list_models(num_turns: int) -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Which of a model's images are scored, and what draws them."""
    turns = tuple(f"turn{number + 1}" for number in range(num_turns))
    return {"base": (("base", "self_cot"), draw_base),
            "trained": (turns, functools.partial(draw_trained, num_turns=num_turns))}


def evaluate(prompts: Sequence[HeldOut], *, config: SamplingConfig, checkpoints: dict[str, str],
             recorder: Recorder, seed: int, batch_size: int, num_turns: int = 2,
             mesh: Mesh | None = None) -> None:
    """Draws and scores what `recorder` lacks; `checkpoints` are paths by the names of `list_models`.

    Raises: ValueError if a prompt holds a control token, or weights changed since the evaluation
        began.
    """
    models = list_models(num_turns)
    wanted = [system for systems, _ in models.values() for system in systems]
    progress = tqdm(total=len(prompts) * len(wanted), initial=len(recorder.done), unit="image",
                    disable=None)
    for name, (systems, draw) in models.items():
        generator, weights = load_generator(
            checkpoints[name], config, mesh=mesh,
            prompts={f"prompt {prompt.id}": prompt.prompt for prompt in prompts})
        recorder.identify(name, weights)
        missing = [prompt for prompt in prompts
                   if not all((prompt.id, system) in recorder.done for system in systems)]
        for batch, padded in in_batches(missing, generator.fit_batch(batch_size)):
            drawn = draw(generator, [prompt.prompt for prompt in padded],
                         [_seed(seed, prompt.id) for prompt in padded])
            for system in systems:
                for prompt, turn in zip(batch, drawn[system]):
                    if (prompt.id, system) not in recorder.done:
                        _record(recorder, prompt, system, turn)
                        progress.update()
            recorder.save()
    progress.close()


def _record(recorder: Recorder, prompt: HeldOut, system: str, turn: Turn) -> None:
    make_record = lambda file: make_result(prompt, system=system, image=turn.image, text=turn.text,
                                           file=file)
    recorder.add(turn.image, make_record, id=prompt.id, system=system)


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every prompt, whatever else is evaluated."""
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0])


def main(values: Any) -> None:
    config = from_config_dict(SamplingConfig, values.config)
    prompts = read_prompts(values.prompts, limit=values.limit)
    batch_size = min(values.batch or config.batch_size, len(prompts))
    settings = describe_settings(config)
    recorder = Recorder(values.out, {"seed": values.seed, "settings": settings, "turns": values.turns,
                                     "prompts": digest_prompts(prompts)})
    is_new = not recorder.is_complete
    evaluate(prompts, config=config, recorder=recorder, seed=values.seed, batch_size=batch_size,
             num_turns=values.turns, mesh=find_mesh(values.mesh),
             checkpoints={"base": values.base, "trained": values.checkpoint})
    if is_new:
        versions = {"python": platform.python_version(), "jax": jax.__version__,
                    "numpy": np.__version__, "device": jax.devices()[0].device_kind}
        recorder.finish(prompts=len(prompts), seed=values.seed, versions=versions,
                        settings=settings | {"batch_size": batch_size},
                        command=shlex.join(["python", "-m", "irg_jax.evaluate", *sys.argv[1:]]))
    done = "evaluated" if is_new else "already evaluated:"
    print(f"{done} {len(prompts)} prompts in {values.out}")


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_enum("benchmark", "shapes", ["shapes"], "What is evaluated.")
    flags.DEFINE_string("base", None, "The base model's checkpoint.")
    flags.DEFINE_string("checkpoint", None, "The trained model: a checkpoint or a stage's folder.")
    flags.DEFINE_string("prompts", None, "The benchmark's prompts, a .jsonl file.")
    flags.DEFINE_string("out", None, "Folder of the results, RUN/eval/shapes for a report of RUN.")
    flags.DEFINE_integer("limit", None, "Take only the first so many prompts.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of texts and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("turns", 2, "Turns of the trained model.", lower_bound=2, upper_bound=9)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.",
                         lower_bound=1)
    flags.DEFINE_string("mesh", "", "Devices to draw on, like data=4,tensor=2; by default the first alone.")
    flags.mark_flags_as_required(["config", "base", "checkpoint", "prompts", "out"])
    command.run(main)
