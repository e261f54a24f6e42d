"""Draws training prompts with a base model: the first images that improving records start from."""

import json
import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.digests import MANIFEST, write_json
from data_pipelines.shapes.drafts import PER_FILE, Draft, finish, order_draft, write_part
from data_pipelines.shapes.records import generator
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import describe_settings, in_batches, load_generator
from irg_jax.sampling.trajectory import Generator

INPUTS = "inputs.json"
# A draft is one picture after a text that is given: no later turn, nothing written or looked at.
UNUSED = ("turn2", "num_turns", "window", "stop_text", "stop_change", "text", "vae_transform",
          "vit_transform", "posterior")


def draw_drafts(drawer: Generator, num: int, *, seed: int, batch_size: int, out: pathlib.Path,
                is_planned: bool = True) -> None:
    """Draws the drafts 0 to `num` file by file, as `order_draft` has them; files that are there stay."""
    parts = range(0, num, PER_FILE)
    progress = tqdm(total=num, desc="drafts", unit="image", disable=None)
    for number, start in enumerate(parts):
        indices, path = range(start, min(start + PER_FILE, num)), out / f"{number:04d}.parquet"
        if path.exists():
            progress.update(len(indices))
            continue
        drafts = []
        for batch, padded in in_batches(indices, batch_size):
            orders = [order_draft(generator(seed, "draft", index), is_planned=is_planned)
                      for index in padded]
            seeds = [int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) for index in padded]
            state = drawer.begin([order.prompt for order in orders], seeds=seeds)
            _, state = drawer.think(state, [order.thought for order in orders])
            drafts += [Draft(*order, image) for order, image, _ in zip(orders, drawer.draw(state), batch)]
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


def make_drafts(checkpoint: str, config: SamplingConfig, num: int, *, seed: int, out: pathlib.Path,
                batch_size: int | None = None, is_planned: bool = True) -> bool:
    """`num` drafts of a checkpoint in `out`; returns False if it held exactly these. Raises: as `claim`.

    They are drawn after IRG's plans if `is_planned`, else after thoughts of the base's own kind.
    """
    drawer, described = load_generator(checkpoint, config, prompts={})
    settings = {name: value for name, value in describe_settings(config).items() if name not in UNUSED}
    inputs = {"checkpoint": described["sha256"], "settings": settings, "seed": seed, "num": num,
              "is_planned": is_planned}
    claim(out, inputs)
    if (out / MANIFEST).exists():
        return False
    draw_drafts(drawer, num, seed=seed, batch_size=min(batch_size or config.batch_size, num), out=out,
                is_planned=is_planned)
    finish(out, **inputs)
    return True
