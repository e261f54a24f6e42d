"""Generates the shapes data set in the released record format.

DIR/train/<mode>/0000.parquet ...   one column `conversation`, pages with checksums
DIR/prompts_heldout.jsonl           prompts that no training record shows
DIR/manifest.json                   counts, configuration, versions, sha256 of every file

The same configuration gives the same bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from data_pipelines.config import BuildConfig
from data_pipelines.digests import MANIFEST
from data_pipelines.manifests import digest_files, is_built, partial_folder, publish
from data_pipelines.shapes import records as shapes
from data_pipelines.shapes.drafts import SeenDraft, describe_drafts, look_at, read_drafts
from data_pipelines.sources import COLUMN

PROMPTS = "prompts_heldout.jsonl"
NUM_PROBED = 4  # records of each mode that tell whether the generator is still the same


def build(config: BuildConfig, *, out: str | pathlib.Path, overwrite: bool = False) -> bool:
    """Generates the shapes data set into `out`.

    Returns: False if `out` already holds exactly this data set, True if it was written.
    Raises: ValueError if `out` holds anything else (a data set is replaced with `overwrite`), or if
        the configuration names an unknown mode.
    """
    out = pathlib.Path(out)
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
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
    partial.mkdir(parents=True)
    seen = look_at(read_drafts(config.drafts)) if drafts else []
    if drafts and not seen:
        raise ValueError(f"{config.drafts}: every draft shows a held-out combination; draw more")
    with tqdm(total=sum(config.counts.values()), unit="record", disable=None) as progress:
        for mode, count in config.counts.items():
            _write_mode(partial / "train" / mode, _conversations(mode, config, seen), count, config, progress)
    (partial / PROMPTS).write_text("".join(prompts), encoding="utf-8")
    versions = {"numpy": np.__version__, "pillow": PIL.__version__,
                "pyarrow": pyarrow.__version__}
    manifest = wanted | {"versions": versions, "files": digest_files(partial)}
    if drafts:
        manifest["drafts_used"] = len(seen)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    publish(out)
    return True


def _describe(config: BuildConfig, prompts: list[str]) -> dict[str, Any]:
    """What the data set is: its configuration, and a probe of what the generator makes of it."""
    probe = hashlib.sha256("".join(prompts).encode())
    for mode in config.counts:
        for text in itertools.islice(_conversations(mode, config), NUM_PROBED):
            probe.update(text.encode())
    return {"source": "shapes", "format": "parquet", "config": dataclasses.asdict(config),
            "probe": probe.hexdigest()}


def _write_mode(folder: pathlib.Path, conversations: Iterator[str], count: int, config: BuildConfig,
                progress: tqdm) -> None:
    folder.mkdir(parents=True)
    schema = pyarrow.schema([(COLUMN, pyarrow.string())])
    for number, start in enumerate(range(0, count, config.rows_per_file)):
        path = folder / f"{number:04d}.parquet"
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd",
                                           write_page_checksum=True) as writer:
            end = min(start + config.rows_per_file, count)
            for row in range(start, end, config.rows_per_group):
                size = min(config.rows_per_group, end - row)
                rows = list(itertools.islice(conversations, size))
                writer.write_table(pyarrow.table([rows], schema=schema))
                progress.update(size)


def _conversations(mode: str, config: BuildConfig, drafts: Sequence[SeenDraft] = ()) -> Iterator[str]:
    """The mode's records without end; those that start from a draft take the drafts in turn."""
    for index in itertools.count():
        rng = shapes.generator(config.seed, mode, index)
        draft = drafts[index % len(drafts)] if drafts else None
        yield json.dumps(shapes.record(mode, rng, split="train", side=config.side, draft=draft))
