"""The records of each group as an endless queue, and the window at its head that competes for packs."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.samples import Cost, draw_all

_KEPT_EPOCHS = 2  # a window spans two at most
_EMPTY = -1       # the place of a slot without a record
_LATEST = 2**60   # behind every place


class Entry(NamedTuple):
    """A record's place in the plan: the `index`-th of its group, in the group's `epoch`-th pass."""

    group: str
    epoch: int
    index: int


class Queue:
    """A group's records, in a new random order every epoch; a place in it is an integer from 0 on."""

    def __init__(self, group: GroupConfig, table: CostTable, config: DataConfig):
        """Raises: ValueError if the group has no usable record."""
        self._group, self._table, self._config = group, table, config
        self._usable = np.flatnonzero(np.diff(table.offsets))
        if not len(self._usable):
            raise ValueError(f"group {group.name!r} has no usable record")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch(self, place: int) -> int:
        return place // len(self._usable)

    def entry(self, place: int) -> Entry:
        epoch, position = divmod(place, len(self._usable))
        return Entry(self._group.name, epoch, int(self._load(epoch)[0][position]))

    def cost(self, place: int) -> np.ndarray:
        """int64 [4], what the record takes in this epoch."""
        epoch, position = divmod(place, len(self._usable))
        return self._load(epoch)[1][position]

    def least_cost(self) -> np.ndarray:
        """int64 [4]: of each field the least in the first epoch, perhaps of different records."""
        return self._load(0)[1].min(axis=0)

    def _load(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The records of an epoch in order, int64 [R], and their costs, int64 [R, 4]."""
        if epoch not in self._epochs:
            order = self._usable[self._shuffle(epoch)]
            items, offsets = self._table.items, self._table.offsets
            enters = draw_all(items[:, 0], offsets, self._config, group=self._group, epoch=epoch)
            totals = np.zeros((len(items) + 1, len(Cost._fields)), np.int64)
            np.cumsum(items[:, 1:] * enters[:, None], axis=0, out=totals[1:])
            self._epochs[epoch] = order, totals[offsets[order + 1]] - totals[offsets[order]]
            if len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.pop(min(self._epochs, key=lambda known: (known == epoch, known)))
        return self._epochs[epoch]

    def _shuffle(self, epoch: int) -> np.ndarray:
        # Sorting raw numbers, because those are promised to stay; `permutation` may change with NumPy.
        key = (self._config.seed, zlib.crc32(self._group.name.encode()), epoch)
        return np.argsort(np.random.Philox(key).random_raw(len(self._usable)), kind="stable")


class Windows:
    """For G groups the next L records of each that may enter a pack; a slot holds one of them.

    A window spans two epochs at most: all records of an epoch are given before any of the next but one.
    Of a small group it therefore has empty slots.

    place: int64 [G, L], of the records in their queues.
    cost: float32 [4, G, L], inf for an empty slot. Below 2**24 float32 counts exactly, and compares fastest.
    """

    def __init__(self, queues: Sequence[Queue], length: int):
        shape = (len(queues), length)
        self._queues, self._all = queues, np.arange(len(queues))
        self.place = np.full(shape, _EMPTY)
        self.cost = np.full((len(Cost._fields), *shape), np.inf, np.float32)
        self._next = np.zeros(len(queues), np.int64)    # place that comes into the window next
        self._rounds = np.zeros(len(queues), np.int64)  # packs that hold a record of the group
        self._since = np.zeros(shape, np.int64)         # rounds when the record came
        for group in range(len(queues)):
            self._refill(group)

    def slot_cost(self, slot: int) -> np.ndarray:
        """float32 [4]; slots are numbered group after group."""
        return self.cost.reshape(len(self.cost), -1)[:, slot].copy()

    def any_fits(self, free: np.ndarray, groups: np.ndarray) -> bool:
        """Whether a record of the `groups`, bool [G], fits into `free`, float32 [4]."""
        return bool(((self.cost <= free[:, None, None]).all(axis=0).any(axis=1) & groups).any())

    def take(self, slots: Sequence[int]) -> list[Entry]:
        """Gives the records of these slots to one pack, and fills the slots again."""
        length, entries = self.place.shape[1], []
        for slot in slots:
            group, column = divmod(slot, length)
            entries.append(self._queues[group].entry(int(self.place[group, column])))
            self.place[group, column], self.cost[:, group, column] = _EMPTY, np.inf
        for group in {slot // length for slot in slots}:
            self._refill(group)
        return entries

    def finish_round(self, groups: Sequence[int]) -> None:
        """A pack is finished, and it holds records of these groups."""
        self._rounds[groups] += 1

    def overdue(self) -> dict[int, int]:
        """Groups whose oldest record at least as many of their packs went without as a window is long.

        Returns: the slot of that record by group, those that waited longest first.
        """
        length = self.place.shape[1]
        oldest = np.where(self.place == _EMPTY, _LATEST, self.place).argmin(axis=1)
        waited = self._rounds - self._since[self._all, oldest]
        groups = [group for group in np.argsort(-waited, kind="stable").tolist() if waited[group] >= length]
        return {group: group * length + int(oldest[group]) for group in groups}

    def state(self) -> np.ndarray:
        """All of it as int64 [n]."""
        return np.concatenate([self._next, self._rounds, self.place.ravel(), self._since.ravel()])

    def restore(self, state: np.ndarray) -> None:
        groups = len(self._queues)
        self._next, self._rounds = state[:groups].copy(), state[groups:2 * groups].copy()
        self.place, self._since = state[2 * groups:].reshape(2, groups, -1).copy()
        self.cost[:] = np.inf
        for group, slot in np.argwhere(self.place != _EMPTY):
            self.cost[:, group, slot] = self._queues[group].cost(int(self.place[group, slot]))

    def _refill(self, group: int) -> None:
        queue, places = self._queues[group], self.place[group]
        for slot in np.flatnonzero(places == _EMPTY):
            place = int(self._next[group])
            waiting = places[places != _EMPTY]
            if len(waiting) and queue.epoch(place) > queue.epoch(int(waiting.min())) + 1:
                break
            places[slot], self.cost[:, group, slot] = place, queue.cost(place)
            self._since[group, slot] = self._rounds[group]
            self._next[group] += 1
