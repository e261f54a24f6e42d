"""What every record costs in each stream, from texts and image headers.

The planner works on these tables alone. A data set that we built brings them along. Reading another for
its headers takes hours when it is large, so with `index_dir` set its tables are kept there, under a name
that changes with all they depend on. Which records fit no pack is found from a table at every start, so
other budgets need no other table.
"""

import errno
import hashlib
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.choices import largest
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.datasets import Source
from data_pipelines.faults import BadRecords, Fault
from data_pipelines.plan_index import told
from data_pipelines.records import Kind
from data_pipelines.samples import BRACKETS, Cost, measure
from data_pipelines.stored_costs import describe_costs
from data_pipelines.tokenizer import Tokenizer


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

    def without(self, indices: list[int], reasons: tuple[str, ...]) -> "CostTable":
        """The same records, but these have no items, for they are oversize."""
        counts = np.diff(self.offsets)
        is_left = np.ones(len(self), bool)
        is_left[indices] = False
        items = self.items[np.repeat(is_left, counts)]
        return CostTable(items, np.concatenate([[0], np.cumsum(counts * is_left)]), self.bad, reasons)

    def opened_by(self, tokens: int) -> "CostTable":
        """The same records, each opened by a system prompt of so many tokens, brackets included; none if 0."""
        if not tokens:
            return self
        counts = np.diff(self.offsets)
        has_items = counts > 0
        row = np.array((Kind.SYSTEM, tokens, 0, 0, 0), np.int32)
        items = np.insert(self.items, self.offsets[:-1][has_items], row, axis=0)
        offsets = np.concatenate([[0], np.cumsum(counts + has_items)])
        return CostTable(items, offsets, self.bad, self.oversize)


def budget(config: DataConfig) -> Cost:
    """What one pack holds."""
    return Cost(config.text_tokens, config.vit_tokens, config.latent_tokens, config.images)


def read_costs(source: Source, *, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
               bad: BadRecords) -> CostTable:
    """The cost table of one group: the data set's own, or from `index_dir`, or measured.

    Raises: ValueError if more records than allowed are bad; one that fits no pack is, unless
        `oversize` is "drop".
    """
    table = measure_costs(source, group=group, config=config, tokenizer=tokenizer, bad=bad)
    indices, sentences = [], []
    for index, reason in find_oversize(table, group=group, config=config):
        indices.append(index)
        # Naming the file means reading the record; records that are dropped at will may be many.
        place = source[index].place if config.oversize == "bad" else f"record {index} of group {group.name!r}"
        sentences.append(f"{place}: the record fits no pack ({reason})")
        if config.oversize == "bad":
            bad.add(Fault(group.name, f"{sentences[-1]}; raise the budgets, or set oversize to 'drop'"))
        else:
            logging.warning("left out an oversize record: %s", sentences[-1])
    return table.without(indices, tuple(sentences)) if indices else table


def measure_costs(source: Source, *, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
                  bad: BadRecords) -> CostTable:
    """The costs of all records that can be read, whatever a pack holds, system prompts included.

    Raises: ValueError if more records than allowed are bad.
    """
    # Kept costs are the records' own, so another system prompt needs no other table.
    table = _read_or_measure(source, group, config, tokenizer, bad)
    return table.opened_by(count_system_tokens(config, group, tokenizer))


def count_system_tokens(config: DataConfig, group: GroupConfig, tokenizer: Tokenizer) -> int:
    """Tokens of a group's system prompt with both brackets; 0 without one."""
    prompt = config.system_prompt_of(group)
    return len(tokenizer.encode(prompt)) + BRACKETS if prompt else 0


def _read_or_measure(source: Source, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
                     bad: BadRecords) -> CostTable:
    key = describe_costs(config, group, tokenizer)
    stored = source.stored_costs(key) if hasattr(source, "stored_costs") else None
    if stored:
        return CostTable(*stored)
    path = None
    if config.index_dir:
        name = json.dumps([source.digest, key, config.unknown_role], sort_keys=True)
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = pathlib.Path(config.index_dir) / f"costs-{group.name}-{digest}.npz"
    if path and path.exists():
        table = _load(path)
        for reason in table.bad:
            bad.add(Fault(group.name, reason))
        return table
    if path is None:
        return _measure_all(source, group, config, tokenizer, bad)
    with told(path, "the cost table cannot be written"):    # sooner than after hours
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    table = _measure_all(source, group, config, tokenizer, bad)
    with told(path, "the cost table cannot be written"):
        _save(path, table)
    return table


def find_oversize(table: CostTable, *, group: GroupConfig, config: DataConfig) -> Iterator[tuple[int, str]]:
    """Records that fit no pack, and why. Dropout may make one smaller; that is not counted on."""
    limits = np.array([*budget(config), config.max_tokens_per_record])
    sums = np.zeros((len(table.items) + 1, len(Cost._fields)), np.int64)
    np.cumsum(table.items[:, 1:], axis=0, out=sums[1:])
    totals = _with_tokens(sums[table.offsets[1:]] - sums[table.offsets[:-1]])
    # Of captions or edits a sample holds but some: what fits as a whole needs no closer look.
    for index in (totals > limits).any(axis=1).nonzero()[0].tolist():
        costs = _with_tokens(largest(group.kind, table.record(index)))
        names = [*Cost._fields, "tokens"]
        over = [f"{name} {cost} > {'max_tokens_per_record ' if name == 'tokens' else ''}{limit}"
                for name, cost, limit in zip(names, costs.max(axis=0), limits) if cost > limit]
        if over:
            yield index, ", ".join(over)


def _with_tokens(costs: np.ndarray) -> np.ndarray:
    """[n, 4] -> [n, 5]: the tokens of the three streams together, too."""
    return np.concatenate([costs, costs[:, :3].sum(axis=1, keepdims=True)], axis=1)


def _measure_all(source: Source, group: GroupConfig, config: DataConfig, tokenizer: Tokenizer,
                 bad: BadRecords) -> CostTable:
    records, reasons = [], []
    for index in tqdm(range(len(source)), f"costs of {group.name}", disable=None, leave=False):
        try:
            items = measure(source[index], config, tokenizer, group=group)
        except ValueError as error:
            reasons.append(str(error))
            bad.add(Fault(group.name, str(error)))  # raises when the allowance is spent, not hours later
            items = np.zeros((0, 1 + len(Cost._fields)), np.int32)
        records.append(items)
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    return CostTable(np.concatenate(records), offsets, tuple(reasons))


def _save(path: pathlib.Path, table: CostTable) -> None:
    # Several hosts may share the folder: each writes its own file, the rename decides.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    np.savez(temporary, items=table.items, offsets=table.offsets, bad=np.array(table.bad, np.str_))
    os.replace(temporary, path)


def _load(path: pathlib.Path) -> CostTable:
    try:
        with np.load(path, allow_pickle=False) as file:
            return CostTable(file["items"], file["offsets"], tuple(file["bad"].tolist()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the cost table is damaged ({error}); delete it") from error
