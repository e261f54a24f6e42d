"""Generates the shapes data set in the released record format.

DIR/train/<mode>/0000.parquet ...   columns `conversation`, `id`, `licence`, `provenance`; pages with checksums
DIR/prompts_heldout.jsonl           prompts that no training record shows
DIR/manifest.json                   counts, configuration, versions, sha256 of every file

The learning modes are gathered, filtered, composed and written by the code of `data_pipelines.curate`, with
renderer and detector as painter and critic (`crew.py`); the base model's modes are only written. The same
configuration gives the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow
from tqdm import tqdm

from data_pipelines.config import BuildConfig
from data_pipelines.curation.collecting import Collector
from data_pipelines.curation.curating import make
from data_pipelines.curation.gathering import Gathered, tell
from data_pipelines.curation.writing import Row
from data_pipelines.jobs import default_workers, map_ahead, open_pool
from data_pipelines.manifests import is_built
from data_pipelines.shapes import records as shapes
from data_pipelines.shapes.crew import LICENCE
from data_pipelines.shapes.drafts import SeenDraft, describe_drafts, look_at, read_drafts

PROMPTS = "prompts_heldout.jsonl"
NUM_PROBED = 4  # records of each mode that tell whether the generator is still the same
RUN_LENGTH = 64  # records that a worker makes at a time
FEW = 5000       # records; to start workers for fewer takes longer than they save


class Run(NamedTuple):
    """Neighbouring records of a mode; each depends on the seed, its number and its draft alone."""

    mode: str
    config: BuildConfig
    numbers: range
    drafts: tuple[SeenDraft | None, ...]    # one a record


def build(config: BuildConfig, *, out: str | pathlib.Path, overwrite: bool = False, workers: int = 0) -> bool:
    """Generates the shapes data set into `out`.

    Args: workers are processes; 0: one for each core, if there is enough to do. The bytes are the same.
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
        return _write_modes(config, seen, folder, workers)

    make(out, wanted, collect=collect, describe=lambda *_: {"versions": versions} | (
        {"drafts_used": len(seen)} if drafts else {}))
    return True


def _describe(config: BuildConfig, prompts: list[str]) -> dict[str, Any]:
    """What the data set is: its configuration, and a probe of what the generator makes of it."""
    probe = hashlib.sha256("".join(prompts).encode())
    for mode in config.counts:
        for one in _gather(Run(mode, config, range(NUM_PROBED), (None,) * NUM_PROBED)):
            row = one if isinstance(one, Row) else tell(one, mode)
            probe.update(json.dumps(row and row.conversation).encode())
    return {"source": "shapes", "format": "parquet", "config": dataclasses.asdict(config),
            "probe": probe.hexdigest()}


def _write_modes(config: BuildConfig, drafts: Sequence[SeenDraft], folder: pathlib.Path,
                 workers: int) -> Collector:
    """All records."""
    folders = {mode: folder / "train" / mode for mode in config.counts}
    total = sum(config.counts.values())
    workers = workers or (default_workers() if total > FEW else 1)
    with (Collector(folders, rows_per_file=config.rows_per_file,
                    rows_per_group=config.rows_per_group) as collector,
          open_pool(workers) if workers > 1 else contextlib.nullcontext() as pool,
          tqdm(total=total, unit="record", disable=None) as progress):
        for mode, count in config.counts.items():
            runs = _list_runs(mode, config, drafts)
            made = map_ahead(pool, _gather, runs, ahead=2 * workers) if pool else map(_gather, runs)
            records = itertools.chain.from_iterable(made)
            while collector.counts[mode] < count:    # in place of one that is not taken comes the next
                one = next(records)
                if isinstance(one, Row):
                    collector.add_row(mode, one)
                else:
                    collector.add(one)
                progress.update()
    return collector


def _list_runs(mode: str, config: BuildConfig, drafts: Sequence[SeenDraft]) -> Iterator[Run]:
    """The mode's records without end; those that start from a draft take the drafts in turn."""
    for first in itertools.count(step=RUN_LENGTH):
        numbers = range(first, first + RUN_LENGTH)
        yield Run(mode, config, numbers,
                  tuple(drafts[number % len(drafts)] if drafts else None for number in numbers))


def _gather(run: Run) -> list[Gathered | Row]:
    mode, config, made = run.mode, run.config, []
    for number, draft in zip(run.numbers, run.drafts, strict=True):
        rng, id_ = shapes.generator(config.seed, mode, number), f"{mode}-{number:06d}"
        if mode in shapes.MODES:
            made.append(shapes.gather_one(mode, rng, split="train", side=config.side, draft=draft, id_=id_))
        else:
            turns = shapes.record(mode, rng, split="train", side=config.side, draft=draft)
            made.append(Row(turns, id_, LICENCE, {"prompt": shapes.SOURCE}))
    return made
