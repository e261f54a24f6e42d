r"""Draws training prompts with the base model: the first images that IRGL's improving records start from.

    python -m irg_jax.draft --config configs/shapes_generate.py --checkpoint runs/shapes/base \
        --num 2000 --out runs/shapes/drafts

The base model thinks, then draws (self-CoT), as the paper's data were made. `data_pipelines.build` reads the
folder with --config.drafts=runs/shapes/drafts. Interrupted, the same command draws only what is missing.
"""

import json
import pathlib
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import from_config_dict
from data_pipelines.digests import MANIFEST, write_json
from data_pipelines.shapes.drafts import PER_FILE, Draft, draft_request, finish, write_part
from data_pipelines.shapes.records import generator
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import describe_settings, in_batches, load_generator
from irg_jax.sampling.trajectory import Generator

INPUTS = "inputs.json"


def draw_drafts(drawer: Generator, num: int, *, seed: int, batch_size: int, out: pathlib.Path) -> None:
    """Draws the drafts 0 to `num` file by file; files that are there stay."""
    parts = range(0, num, PER_FILE)
    progress = tqdm(total=num, desc="drafts", unit="image", disable=None)
    for number, start in enumerate(parts):
        indices, path = range(start, min(start + PER_FILE, num)), out / f"{number:04d}.parquet"
        if path.exists():
            progress.update(len(indices))
            continue
        drafts = []
        for batch, padded in in_batches(indices, batch_size):
            asked = [draft_request(generator(seed, "draft", index)) for index in padded]
            seeds = [int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) for index in padded]
            turns = drawer.trajectories([prompt for prompt, _ in asked], seeds=seeds, num_turns=1)
            drafts += [Draft(*one, turn.text, turn.image) for one, (turn,), _ in zip(asked, turns, batch)]
            progress.update(len(batch))
        write_part(path, drafts)
    progress.close()


def claim(out: pathlib.Path, inputs: dict[str, Any]) -> None:
    """Notes what `out` is made from. Raises: ValueError if it holds something else."""
    path = out / INPUTS
    if out.exists() and any(out.iterdir()) and not path.exists():
        raise ValueError(f"{str(out)!r} holds something else than drafts; choose another --out")
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != inputs:
        raise ValueError(f"{str(out)!r} holds other drafts (see {INPUTS}); choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, inputs)


def main(values: Any) -> None:
    config, out = from_config_dict(SamplingConfig, values.config), pathlib.Path(values.out)
    drawer, checkpoint = load_generator(values.checkpoint, config, prompts={})
    inputs = {"checkpoint": checkpoint["sha256"], "settings": describe_settings(config), "seed": values.seed,
              "num": values.num}
    claim(out, inputs)
    if (out / MANIFEST).exists():
        print(f"already drawn: {values.num} drafts in {out}")
        return
    batch_size = min(values.batch or config.batch_size, values.num)
    draw_drafts(drawer, values.num, seed=values.seed, batch_size=batch_size, out=out)
    finish(out, **inputs)
    print(f"drew {values.num} drafts into {out}")


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "The base model's checkpoint.")
    flags.DEFINE_string("out", None, "Folder of the drafts.")
    flags.DEFINE_integer("num", 2000, "How many are drawn.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of prompts, texts and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.", lower_bound=1)
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
