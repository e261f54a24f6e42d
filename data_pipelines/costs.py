"""What every record costs in each stream, read once from texts and image headers.

The planner works on these tables alone. Reading a large data set for its headers takes hours, so
with `index_dir` set the tables are kept there, under a name that changes with all they depend on.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import threading
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.datasets import Source
from data_pipelines.samples import Cost, measure
from data_pipelines.tokenizer import Tokenizer

# The fields of DataConfig that a table depends on; the rest only arranges the same records.
_FIELDS = ("text_tokens", "vit_tokens", "latent_tokens", "images", "max_tokens_per_record",
           "vae_transform", "vit_transform", "latent_patch", "vit_patch", "max_latent_size",
           "vit_max_side", "unknown_role", "max_text_chars", "max_image_bytes", "max_image_pixels")


class CostTable(NamedTuple):
    """What the records of one group cost, item by item.

    Record i has the rows offsets[i] to offsets[i + 1] of `items`. A record without items
    (unreadable, or oversize) never enters a pack.
    """

    items: np.ndarray    # int32 [M, 5]: Kind and the fields of Cost
    offsets: np.ndarray  # int64 [R + 1]
    bad: tuple[str, ...] = ()       # a sentence for each unreadable record
    oversize: tuple[str, ...] = ()  # a sentence for each record that fits no pack

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def record(self, index: int) -> np.ndarray:
        """int32 [items, 5] of one record."""
        return self.items[self.offsets[index]:self.offsets[index + 1]]


class BadRecords:
    """Counts records that had to be left out, names each, and stops over `limit`. Thread-safe."""

    def __init__(self, limit: int):
        self._limit = limit
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._named)

    def add(self, reason: str) -> None:
        """Raises: ValueError with `reason` if that makes more than `limit` records."""
        with self._lock:
            if reason in self._named:  # met again in a later epoch
                return
            self._named.add(reason)
            count = len(self._named)
        if count > self._limit:
            raise ValueError(f"{reason} (bad record {count}; max_bad_records is {self._limit})")
        logging.warning("left out bad record %d of at most %d: %s", count, self._limit, reason)


def budget(config: DataConfig) -> Cost:
    """What one pack holds."""
    return Cost(config.text_tokens, config.vit_tokens, config.latent_tokens, config.images)


def read_costs(source: Source, *, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
               bad: BadRecords) -> CostTable:
    """The cost table of one group, from `index_dir` if it is there.

    Raises: ValueError if more records than allowed are bad, or if one fits no pack and `oversize`
        is "error".
    """
    path = None
    if config.index_dir:
        name = _fingerprint(source, group, config, tokenizer)
        path = pathlib.Path(config.index_dir) / f"costs-{group.name}-{name}.npz"
    if path and path.exists():
        table = _load(path)
    else:
        table = _measure_all(source, group, config, tokenizer, bad)
        if path:
            _save(path, table)
    for reason in table.bad:
        bad.add(reason)
    for reason in table.oversize:
        if config.oversize == "error":
            raise ValueError(f"{reason}; raise the budgets, or set oversize to 'drop'")
        logging.warning("left out an oversize record: %s", reason)
    return table


def _measure_all(source: Source, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
                 bad: BadRecords) -> CostTable:
    records, bad_reasons, oversize = [], [], []
    nothing = np.zeros((0, 1 + len(Cost._fields)), np.int32)
    for index in tqdm(range(len(source)), f"costs of {group.name}", disable=None, leave=False):
        try:
            record = source[index]
            items = measure(record, config, tokenizer, group=group)
        except ValueError as error:
            bad_reasons.append(str(error))
            bad.add(str(error))  # raises at once when the allowance is spent, not hours later
            items = nothing
        reason = _oversize_reason(items, config)
        if reason:
            oversize.append(f"{record.place}: the record fits no pack ({reason})")
            items = nothing
        records.append(items)
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    return CostTable(np.concatenate(records), offsets, tuple(bad_reasons), tuple(oversize))


def _oversize_reason(items: np.ndarray, config: DataConfig) -> str:
    """Why a record fits no pack; empty if it fits. Dropout may make it smaller; not counted on."""
    cost = Cost(*(int(total) for total in items[:, 1:].sum(axis=0)))
    over = [f"{name} {value} > {limit}" for name, value, limit
            in zip(Cost._fields, cost, budget(config)) if value > limit]
    tokens = cost.text + cost.vit + cost.latent
    if tokens > config.max_tokens_per_record:
        over.append(f"tokens {tokens} > max_tokens_per_record {config.max_tokens_per_record}")
    return ", ".join(over)


def _fingerprint(source: Source, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer) -> str:
    fields = dataclasses.asdict(config)
    key = [source.digest, dataclasses.asdict(group), {name: fields[name] for name in _FIELDS},
           tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _save(path: pathlib.Path, table: CostTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several hosts may share the folder: each writes its own file, the rename decides.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    np.savez(temporary, items=table.items, offsets=table.offsets,
             bad=np.array(table.bad, np.str_), oversize=np.array(table.oversize, np.str_))
    os.replace(temporary, path)


def _load(path: pathlib.Path) -> CostTable:
    try:
        with np.load(path, allow_pickle=False) as file:
            return CostTable(file["items"], file["offsets"], tuple(file["bad"].tolist()),
                             tuple(file["oversize"].tolist()))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: the cost table is damaged ({error}); delete it") from error
