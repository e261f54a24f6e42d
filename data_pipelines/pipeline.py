"""Packed batches for the trainer: plan -> read -> assemble -> stack, and one integer of state.

Step s of the run is packs [s * packs_per_step, (s + 1) * packs_per_step) of the plan, whoever
reads them: each of `process_count` processes takes its own contiguous share. So the global batches
are the same on any number of processes, and the position to resume from is the next step.
"""

import hashlib
import json
import pathlib
from dataclasses import asdict
from typing import Any

import grain
import numpy as np

from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import BadRecords, budget, read_costs
from data_pipelines.datasets import open_source
from data_pipelines.moments import Moments, describe
from data_pipelines.packing import assemble
from data_pipelines.planning import Entry, Planner
from data_pipelines.samples import Cost, Item, realise
from data_pipelines.tokenizer import Tokenizer

_ENDLESS = 2**40  # steps; Grain's MapDataset wants a length
# What may change between two runs that resume one another: how the same batches are read.
_READING = ("source", "read_threads", "prefetch", "cache_mib", "index_dir", "max_bad_records")


class Packs:
    """Random access to the packs of a plan: `packs[i]` is a PackedBatch without B. Thread-safe."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, keep_journal: bool = True):
        """Reads the costs of every record.

        Args: keep_journal lets this process write the plan's journal in `index_dir`; all read it.
        Raises: ValueError as sources, costs and planning do.
        """
        self.config, self._tokenizer = config, tokenizer
        self.bad = BadRecords(config.max_bad_records)
        self._groups = {group.name: group for group in config.groups}
        self._sources = {name: open_source(config, group) for name, group in self._groups.items()}
        self.tables = {name: read_costs(self._sources[name], group=group, config=config, tokenizer=tokenizer,
                                        bad=self.bad)
                       for name, group in self._groups.items()}
        self._moments = {name: self._open_moments(group) for name, group in self._groups.items()}
        self._layout = next(iter(self._moments.values())).layout if config.moments else None
        journal = None
        if config.index_dir:
            journal = pathlib.Path(config.index_dir) / f"plan-{self.fingerprint[:16]}.jsonl"
        self.planner = Planner(config, self.tables, journal=journal, keep_journal=keep_journal)

    def __getitem__(self, index: int) -> PackedBatch:
        samples = []
        for entry in self.planner[index].entries:
            try:
                samples.append(self._sample(entry))
            except ValueError as error:
                # The pack keeps its other records, so that batches stay the same everywhere.
                self.bad.add(str(error))
        return assemble(samples, config=self.config, tokenizer=self._tokenizer, moments=self._layout)

    def _sample(self, entry: Entry) -> list[Item]:
        record, moments = self._sources[entry.group][entry.index], self._moments[entry.group]
        return realise(record, self.planner.draws(entry), self.config, self._tokenizer,
                       group=self._groups[entry.group],
                       moments=moments.of(entry.index, record) if moments else None)

    def _open_moments(self, group: GroupConfig) -> Moments | None:
        if not self.config.moments:
            return None
        digest = self._sources[group.name].digest
        return Moments(self.config.moments, group, wanted=describe(self.config, group, digest=digest))

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the batches: config, tokenizer, the costs of every record."""
        fields = {name: value for name, value in asdict(self.config).items()
                  if name not in _READING}
        digest = hashlib.sha256(json.dumps([fields, self._tokenizer.fingerprint]).encode())
        for table in self.tables.values():
            digest.update(table.items.tobytes() + table.offsets.tobytes())
        return digest.hexdigest()


class BatchIterator:
    """Endless PackedBatches [packs_per_step / process_count, ...]; its state is the next step."""

    def __init__(self, packs: Packs, *, start: int, process_index: int, process_count: int):
        self.packs = packs
        self._share = packs.config.packs_per_step // process_count
        self._process_index = process_index
        self._iterator: Any = None
        self.set_state(start)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> PackedBatch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> int:
        """The step whose batch comes next."""
        return self._step

    def set_state(self, step: int) -> None:
        """Goes to a step, on any number of processes. Raises: ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"data position {step} is negative")
        self.close()
        config = self.packs.config
        # Grain would keep 500 batches ready on 16 threads: gigabytes, where batches hold images.
        options = grain.ReadOptions(num_threads=min(config.read_threads, config.prefetch),
                                    prefetch_buffer_size=config.prefetch)
        steps = grain.MapDataset.range(step, _ENDLESS)
        self._iterator = iter(steps.map(self._load).to_iter_dataset(options))
        self._step = step

    def _load(self, step: int) -> PackedBatch:
        """This process's share of a step's packs."""
        first = step * self.packs.config.packs_per_step + self._process_index * self._share
        packs = [self.packs[first + i] for i in range(self._share)]
        return PackedBatch(*(_stack(field) for field in zip(*packs)))

    def close(self) -> None:
        """Stops reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def fill(self, step: int) -> dict[str, float]:
        """Used share of each stream over all packs of a step, of all processes."""
        first, count = step * self.packs.config.packs_per_step, self.packs.config.packs_per_step
        used = np.sum([self.packs.planner[first + i].cost for i in range(count)], axis=0)
        full = np.maximum(np.array(budget(self.packs.config)) * count, 1)
        return dict(zip(Cost._fields, (used / full).tolist()))

    @property
    def counters(self) -> dict[str, int]:
        """Records this process left out so far: `bad_records`, and `oversize_records`."""
        oversize = sum(len(table.oversize) for table in self.packs.tables.values())
        return {"bad_records": len(self.packs.bad), "oversize_records": oversize}

    @property
    def fingerprint(self) -> str:
        """See `Packs.fingerprint`; a resumed run whose value differs would get other batches."""
        return self.packs.fingerprint


def make_iterator(config: DataConfig, tokenizer: Tokenizer, *, start: int = 0,
                  process_index: int = 0, process_count: int = 1) -> BatchIterator:
    """Opens the data set and returns the batches of one process from step `start` on.

    Raises: ValueError if packs_per_step does not divide by process_count, or if the data are bad.
    """
    if config.packs_per_step % process_count:
        raise ValueError(f"packs_per_step {config.packs_per_step} does not divide by "
                         f"{process_count} processes")
    packs = Packs(config, tokenizer, keep_journal=process_index == 0)
    return BatchIterator(packs, start=start, process_index=process_index,
                         process_count=process_count)


def _stack(values: tuple) -> np.ndarray | Rows:
    if isinstance(values[0], Rows):
        return Rows(*(np.stack(row) for row in zip(*values)))
    return np.stack(values)
