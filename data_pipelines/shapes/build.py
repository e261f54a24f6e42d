"""Generates the shapes data set in the released record format.

DIR/train/<mode>/0000.parquet ...   columns `conversation`, `id`, `licence`, `provenance`; pages with checksums
DIR/prompts_heldout.jsonl           prompts that no training record shows
DIR/manifest.json                   counts, configuration, versions, sha256 of every file

The learning modes are gathered, filtered, composed and written by the code of `data_pipelines.curate`, with
renderer and detector as painter and critic (`crew.py`); the base model's modes are only written. The same
configuration gives the same bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import pyarrow
from tqdm import tqdm

from data_pipelines.config import BuildConfig
from data_pipelines.curation.collecting import Collector
from data_pipelines.curation.curating import make
from data_pipelines.curation.gathering import Gathered, tell
from data_pipelines.curation.writing import Row
from data_pipelines.manifests import is_built
from data_pipelines.shapes import records as shapes
from data_pipelines.shapes.crew import LICENCE
from data_pipelines.shapes.drafts import SeenDraft, describe_drafts, look_at, read_drafts

PROMPTS = "prompts_heldout.jsonl"
NUM_PROBED = 4  # records of each mode that tell whether the generator is still the same


def build(config: BuildConfig, *, out: str | pathlib.Path, overwrite: bool = False) -> bool:
    """Generates the shapes data set into `out`.

    Returns: False if `out` already holds exactly this data set, True if it was written.
    Raises: ValueError if `out` holds anything else (a data set is replaced with `overwrite`), or if
        the configuration names an unknown mode.
    """
    out = pathlib.Path(out).resolve()    # a link stays, and leads to the data set
    drafts = describe_drafts(config.drafts) if config.drafts else None
    known = {*shapes.MODES, *shapes.BASE_MODES}
    for mode in config.counts:
        if mode not in known:
            raise ValueError(f"counts name the unknown mode {mode!r}; use {sorted(known)}")
    prompts = [json.dumps(prompt, sort_keys=True) + "\n" for prompt
               in shapes.heldout_prompts(config.num_heldout_prompts, seed=config.seed)]
    wanted = _describe(config, prompts) | ({"drafts": drafts["files"]} if drafts else {})
    if is_built(out, wanted, overwrite=overwrite):
        return False
    seen = look_at(read_drafts(config.drafts)) if drafts else []
    if drafts and not seen:
        raise ValueError(f"{config.drafts}: every draft shows a held-out combination; draw more")
    versions = {"numpy": np.__version__, "pillow": PIL.__version__,
                "pyarrow": pyarrow.__version__}

    def collect(folder: pathlib.Path) -> Collector:
        (folder / PROMPTS).write_text("".join(prompts), encoding="utf-8")
        return _write_modes(config, seen, folder)

    make(out, wanted, collect=collect, describe=lambda *_: {"versions": versions} | (
        {"drafts_used": len(seen)} if drafts else {}))
    return True


def _describe(config: BuildConfig, prompts: list[str]) -> dict[str, Any]:
    """What the data set is: its configuration, and a probe of what the generator makes of it."""
    probe = hashlib.sha256("".join(prompts).encode())
    for mode in config.counts:
        for one in itertools.islice(_gathered(mode, config), NUM_PROBED):
            row = one if isinstance(one, Row) else tell(one, mode)
            probe.update(json.dumps(row and row.conversation).encode())
    return {"source": "shapes", "format": "parquet", "config": dataclasses.asdict(config),
            "probe": probe.hexdigest()}


def _write_modes(config: BuildConfig, drafts: Sequence[SeenDraft], folder: pathlib.Path) -> Collector:
    """All records."""
    folders = {mode: folder / "train" / mode for mode in config.counts}
    with (Collector(folders, rows_per_file=config.rows_per_file,
                    rows_per_group=config.rows_per_group) as collector,
          tqdm(total=sum(config.counts.values()), unit="record", disable=None) as progress):
        for mode, count in config.counts.items():
            records = _gathered(mode, config, drafts)
            while collector.counts[mode] < count:    # in place of one that is not taken comes the next
                one = next(records)
                if isinstance(one, Row):
                    collector.add_row(mode, one)
                else:
                    collector.add(one)
                progress.update()
    return collector


def _gathered(mode: str, config: BuildConfig, drafts: Sequence[SeenDraft] = ()) -> Iterator[Gathered | Row]:
    """The mode's records without end; those that start from a draft take the drafts in turn."""
    for index in itertools.count():
        rng, id_ = shapes.generator(config.seed, mode, index), f"{mode}-{index:06d}"
        draft = drafts[index % len(drafts)] if drafts else None
        if mode in shapes.MODES:
            yield shapes.gather_one(mode, rng, split="train", side=config.side, draft=draft, id_=id_)
        else:
            turns = shapes.record(mode, rng, split="train", side=config.side, draft=draft)
            yield Row(turns, id_, LICENCE, {"prompt": shapes.SOURCE})
