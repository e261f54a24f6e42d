"""Packed batches for the trainer: plan -> read -> assemble -> stack, and one integer of state.

Step s of the run is packs [s * packs_per_step, (s + 1) * packs_per_step) of the plan, whoever reads
them: each process takes those `rows` of a step that its devices hold, and reads them in threads, or
deals its steps out to worker processes. What a pack holds depends on the data, the config and its index
alone. So the global batches are the same for any number of processes and workers, and the position to
resume from is the next step.

A record that turns out broken when it is read is replaced by the next of its group that fits into the
room the plan gave it, else by padding. Faults travel with the batch and are counted when the trainer
takes it: a run past its allowance ends at the same step however far ahead it had read.
"""

import logging
import operator
import pathlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import grain
import numpy as np

from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable, budget, read_costs
from data_pipelines.datasets import open_source
from data_pipelines.faults import BadRecords, Fault
from data_pipelines.fingerprints import compare, describe_data, digest_values
from data_pipelines.moments import Moments, describe
from data_pipelines.packing import assemble, empty_pack
from data_pipelines.planning import Entry, Planner
from data_pipelines.samples import Cost, Draws, Item, cost_of, realise
from data_pipelines.staging import stage_mixture
from data_pipelines.system_prompts import name_system_prompt
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.workers import explain_death, prefetch

_ENDLESS = 2**40     # packs or steps; Grain's MapDataset wants a length
_MAX_SEARCHED = 4096  # records that are asked whether they can stand in for a broken one


class Loaded(NamedTuple):
    """Packs, and the faults that were met in reading them."""

    batch: PackedBatch
    faults: tuple[Fault, ...]


class Packs:
    """Random access to the packs of a plan: `packs[i]` is a PackedBatch without B. Thread-safe.

    `grain.MapDataset.source(packs)` makes it a Grain data set. Copied into another process, it opens
    the same files there and keeps the cost tables.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, keep_journal: bool = True,
                 tables: Mapping[str, CostTable] | None = None):
        """Reads the costs of every record, unless `tables` has them.

        Args: keep_journal lets this process write the plan's journal in `index_dir`; all read it.
        Raises: ValueError as sources, costs and planning do, or if too many records are bad.
        """
        self.config, self._tokenizer = config, tokenizer
        self._groups = {group.name: group for group in config.groups}
        self._expected = {group.name for group in config.groups if group.is_mandatory}  # until one is missing
        self._sources = {name: open_source(config, group) for name, group in self._groups.items()}
        sizes = {name: len(source) for name, source in self._sources.items()}
        self.bad = BadRecords(sizes, config.max_bad_share)
        self.tables = tables or {
            name: read_costs(self._sources[name], group=group, config=config, tokenizer=tokenizer, bad=self.bad)
            for name, group in self._groups.items()}
        self._moments = {name: self._open_moments(group) for name, group in self._groups.items()}
        self._layout = next(iter(self._moments.values())).layout if config.moments else None
        digests = {name: source.digest for name, source in self._sources.items()}
        self.fingerprint = describe_data(config, tokenizer, self.tables, digests)
        journal = None
        if config.index_dir:
            journal = pathlib.Path(config.index_dir) / f"plan-{digest_values(self.fingerprint)}.index"
        self.planner = Planner(config, self.tables, journal=journal, keep_journal=keep_journal)

    def __reduce__(self):
        return _reopen, (self.config, self._tokenizer, self.tables)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> PackedBatch:
        return self.load(index).batch

    def load(self, index: int, into: PackedBatch | None = None) -> Loaded:
        """A pack without B, with the faults of its records; written `into` an empty one if given."""
        faults: list[Fault] = []
        entries = self.planner[index].entries
        self._warn_once(index, self._expected - {entry.group for entry in entries})
        samples = [self._sample(entry, faults) for entry in entries]
        numbers = {name: number for number, name in enumerate(self._groups)}
        batch = assemble(samples, config=self.config, tokenizer=self._tokenizer, moments=self._layout,
                         into=into, groups=[numbers[entry.group] for entry in entries])
        return Loaded(batch, tuple(faults))

    def fetch(self, indices: Iterable[int]) -> None:
        """Brings what these packs are planned to read to this host, where a source was staged in part."""
        records: dict[str, set[int]] = {name: set() for name in self._sources}
        for index in indices:
            for entry in self.planner[index].entries:
                records[entry.group].add(entry.index)
        for name, source in self._sources.items():
            if hasattr(source, "fetch"):
                source.fetch(records[name])

    def place(self, entry: Entry) -> str:
        """A planned record for a person: its group, its number there, and where that is."""
        try:
            where = self._sources[entry.group][entry.index].place
        except ValueError as error:
            where = str(error)
        return f"{entry.group} {entry.index} ({where})"

    def empty(self, count: int) -> PackedBatch:
        """`count` packs of nothing but padding."""
        return empty_pack(self.config, self._layout, lead=(count,))

    def _warn_once(self, index: int, left_out: set[str]) -> None:
        if left_out:
            self._expected = set()
            logging.warning("pack %d has no room for a record of %s, though mandatory, and it will not be the "
                            "last; for budgets that hold one of each run python -m data_pipelines.budget",
                            index, sorted(left_out))

    def _sample(self, entry: Entry, faults: list[Fault]) -> list[Item]:
        """The planned record, or the first that can be read and fits into its room; else nothing.

        Faults that end the run end the search, too.
        """
        for candidate in self._candidates(entry):
            try:
                return self._realise(candidate)
            except ValueError as error:
                faults.append(Fault(entry.group, str(error)))
            if len({fault for fault in faults if fault.group == entry.group}) > self.bad.allowed(entry.group):
                break
        return []

    def _candidates(self, entry: Entry) -> Iterator[Entry]:
        yield entry
        room, count = self._cost(entry), len(self.tables[entry.group])
        for step in range(1, min(count, _MAX_SEARCHED)):
            candidate = entry._replace(index=(entry.index + step) % count)
            cost = self._cost(candidate)
            if cost.any() and (cost <= room).all():
                yield candidate

    def _cost(self, entry: Entry, draws: Draws | None = None) -> np.ndarray:
        """int [4]; zero for a record without items, which is bad or oversize. Drawing takes longest."""
        items = self.tables[entry.group].record(entry.index)
        if not len(items):
            return np.zeros(len(Cost._fields), np.int64)
        draws = draws or self.planner.draws(entry)
        return items[draws.chosen[draws.keep], 1:].sum(axis=0)

    def _realise(self, entry: Entry) -> list[Item]:
        record, moments = self._sources[entry.group][entry.index], self._moments[entry.group]
        draws = self.planner.draws(entry)
        items = realise(record, draws, self.config, self._tokenizer, group=self._groups[entry.group],
                        moments=moments.of(entry.index, record) if moments else None)
        found, planned = cost_of(items, self.config), Cost(*self._cost(entry, draws).tolist())
        if found != planned:    # no digest knows the images beside JSONL
            raise ValueError(f"{record.place}: the record takes {found}, planned were {planned}: its images "
                             "changed since; remove the cost tables in index_dir, or build the data set again")
        return items

    def _open_moments(self, group: GroupConfig) -> Moments | None:
        if not self.config.moments:
            return None
        digest = self._sources[group.name].digest
        return Moments(self.config.moments, group, wanted=describe(self.config, group, digest=digest))


def _reopen(config: DataConfig, tokenizer: Tokenizer, tables: dict[str, CostTable]) -> Packs:
    return Packs(config, tokenizer, keep_journal=False, tables=tables)


class Share:
    """One process's part of every step: `share[step]` is Loaded with [rows, ...]."""

    def __init__(self, packs: Packs, rows: Sequence[int]):
        """Args: rows of a step, below packs_per_step. Raises: ValueError if there are none, or others."""
        self._packs, self._all, self._rows = packs, packs.config.packs_per_step, tuple(rows)
        if not self._rows or not set(self._rows) <= set(range(self._all)):
            raise ValueError(f"rows {self._rows} of a step: give some of its {self._all} packs "
                             "(packs_per_step)")

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Loaded:
        batch, faults = self._packs.empty(len(self._rows)), []
        for i, index in enumerate(self.indices(step)):
            faults += self._packs.load(index, _map_arrays(operator.itemgetter(i), batch)).faults
        return Loaded(batch, tuple(faults))

    def indices(self, step: int) -> list[int]:
        """The packs of a step that are this process's."""
        return [step * self._all + row for row in self._rows]


class BatchIterator:
    """Endless PackedBatches [rows, ...]; its state is the next step."""

    def __init__(self, packs: Packs, *, start: int, rows: Sequence[int]):
        self.packs = packs
        self.faults: tuple[Fault, ...] = ()    # of the last batch
        self._share = Share(packs, rows)
        self._readers: list[grain.DatasetIterator] = []  # the one in use
        weakref.finalize(self, _stop, self._readers)     # at the latest when Python ends
        self.set_state(start)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> PackedBatch:
        """Raises: ValueError if more records are bad than allowed, or if a worker was killed."""
        try:
            batch, faults = next(self._readers[0])
        except RuntimeError as error:
            if death := explain_death(error):
                raise death from error
            raise
        self.faults = faults
        for fault in faults:
            self.packs.bad.add(fault)
        self._step += 1
        # Grain unlinks a worker's shared memory when its array is collected; nobody may hold on to one.
        return _map_arrays(np.array, batch) if self.packs.config.workers else batch

    def get_state(self) -> int:
        """The step whose batch comes next."""
        return self._step

    def set_state(self, step: int) -> None:
        """Goes to a step, on any number of processes. Raises: ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"data position {step} is negative")
        self.close()
        config = self.packs.config
        self._readers.append(prefetch(grain.MapDataset.source(self._share)[step:], workers=config.workers,
                                      threads=config.read_threads, batches=config.prefetch))
        self._step = step

    def close(self) -> None:
        """Stops reading ahead, and the workers."""
        _stop(self._readers)

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the next step, and what decides the batches from there, as JSON."""
        plan = digest_values([self.packs.planner[index].entries for index in self._packs_of(step)])
        return {"next_step": step, "fingerprint": self.packs.fingerprint | {"plan": plan}}

    def check_position(self, saved: Mapping[str, Any]) -> None:
        """Compares a kept position with this run.

        Raises: ValueError naming what changed, unless `accept_changed_data`; then it is logged.
        """
        known, step = saved["fingerprint"], saved["next_step"]
        if not isinstance(known, Mapping):
            known = {}  # of a run that kept one digest of everything
        differences = compare(known, self.position(step)["fingerprint"])
        if not differences:
            return
        sentence = f"since step {step} was saved, what decides the batches changed: {'; '.join(differences)}"
        if not self.packs.config.accept_changed_data:
            raise ValueError(f"{sentence}. Undo that, use another --workdir, or go on with other batches by "
                             "--config.data.accept_changed_data=True")
        logging.warning("%s", sentence)

    def fill(self, step: int) -> dict[str, float]:
        """Used share of each stream over all packs of a step, of all processes."""
        indices = self._packs_of(step)
        used = np.sum([self.packs.planner[index].cost for index in indices], axis=0)
        full = np.maximum(np.array(budget(self.packs.config)) * len(indices), 1)
        return dict(zip(Cost._fields, (used / full).tolist()))

    def records(self, step: int) -> list[str]:
        """The records of a step, of all processes: group, number in it, and place if it can be read."""
        entries = [entry for index in self._packs_of(step) for entry in self.packs.planner[index].entries]
        return [self.packs.place(entry) for entry in entries]

    @property
    def counters(self) -> dict[str, int]:
        """Records left out so far: `bad_records`, `bad_<cause>` of them, and `oversize_records`.

        Those found at the start are counted by every process, those found later by the one that read, and by
        whom it tells of its `faults`.
        """
        oversize = sum(len(table.oversize) for table in self.packs.tables.values())
        return self.packs.bad.counts | {"oversize_records": oversize}

    def _packs_of(self, step: int) -> range:
        count = self.packs.config.packs_per_step
        return range(step * count, (step + 1) * count)


def make_iterator(config: DataConfig, tokenizer: Tokenizer, *, start: int = 0,
                  rows: Sequence[int] | None = None, keep_journal: bool = True) -> BatchIterator:
    """Opens the data set and returns the batches of one process from step `start` on.

    With `stage_dir`, the data set is copied there first, see `staging`.

    Args:
        rows: the packs of every step that this process reads, in order; all if left out.
        keep_journal: this process writes the plan's journal (`index_dir`), which all read.
    Raises: ValueError if a step has no such rows, the file of a system prompt cannot be read, or the data
        are bad.
    """
    for group in config.groups:
        if prompt := config.system_prompt_of(group):
            logging.info("system prompt of group %s: %s (%d characters)", group.name,
                         name_system_prompt(prompt) or "own wording", len(prompt))
    if config.stage_dir:
        config = replace(config, source=str(stage_mixture(config)))
    packs = Packs(config, tokenizer, keep_journal=keep_journal)
    rows = range(config.packs_per_step) if rows is None else rows
    share = Share(packs, rows)
    packs.fetch(index for step in range(start, start + config.stage_steps) for index in share.indices(step))
    return BatchIterator(packs, start=start, rows=rows)


def _map_arrays(function: Callable[[np.ndarray], np.ndarray], batch: Any) -> Any:
    """A PackedBatch, or Rows, of `function` of every array."""
    return type(batch)(*(_map_arrays(function, field) if isinstance(field, Rows) else function(field)
                         for field in batch))


def _stop(readers: list[grain.DatasetIterator]) -> None:
    while readers:
        readers.pop().close()
