"""Which records share a pack: planned ahead from their costs, never improvised while reading.

Each group (learning mode) is an endless queue: its records in a new random order every epoch. A
pack takes one record of every mandatory group, then fills up by group weights, choosing among the
next `lookahead` records of a group the one that fills it best. The plan depends on the seed and
the costs alone, so every process, however many there are, walks the same one, and a position in it
is an integer.
"""

import json
import pathlib
import threading
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable, budget
from data_pipelines.samples import Cost, Draws, draw

CHUNK = 64         # packs planned at a time
_KEPT_STATES = 16  # chunks to go back to, in memory, without planning from the beginning
_KEPT_CHUNKS = 8   # of finished plans
_JOURNALLED = 16   # every so many chunks the state goes to the journal
_ORDER = 1         # separates the shuffling stream from the stream of `samples.draw`


class Entry(NamedTuple):
    """A record's place in the plan: the `index`-th of its group, in the group's `epoch`-th pass."""

    group: str
    epoch: int
    index: int


class Pack(NamedTuple):
    """The records of one pack, in order, and the tokens they fill."""

    entries: tuple[Entry, ...]
    cost: Cost


class _Queue:
    """The endless sequence of a group's records, and the window of it that competes for places."""

    def __init__(self, group: GroupConfig, table: CostTable, config: DataConfig):
        self.name = group.name
        self._group = group
        self._table, self._config = table, config
        self._usable = np.flatnonzero(np.diff(table.offsets))
        if not len(self._usable):
            raise ValueError(f"group {self.name!r} has no usable record")
        self._epoch = self._cursor = 0
        self._order = self._shuffle(0)
        self.window: list[Entry] = []
        self.costs = np.zeros((0, len(Cost._fields)), np.int64)
        self.passed_over = 0  # packs that had no room for the oldest record
        self._refill()

    def take(self, position: int) -> tuple[Entry, np.ndarray]:
        """Removes a record of the window; returns it and its int64 [4] cost."""
        entry, cost = self.window.pop(position), self.costs[position]
        self.costs = np.delete(self.costs, position, axis=0)
        if position == 0:
            self.passed_over = 0
        self._refill()
        return entry, cost

    def state(self) -> tuple:
        return self._epoch, self._cursor, tuple(self.window), self.passed_over

    def restore(self, state: tuple) -> None:
        self._epoch, self._cursor, window, self.passed_over = state
        self._order = self._shuffle(self._epoch)
        self.window = [Entry(*entry) for entry in window]
        self.costs = np.array([self._cost(entry) for entry in self.window])

    def _refill(self) -> None:
        entries = []
        while len(self.window) + len(entries) < self._config.lookahead:
            epoch, cursor = self._epoch, self._cursor
            if cursor == len(self._usable):
                epoch, cursor = epoch + 1, 0
            waiting = [*self.window[:1], *entries[:1]]
            if waiting and epoch > waiting[0].epoch + 1:
                break  # a small group would mix many epochs of the same few records
            if epoch != self._epoch:
                self._order = self._shuffle(epoch)
            self._epoch, self._cursor = epoch, cursor + 1
            entries.append(Entry(self.name, epoch, int(self._order[cursor])))
        self.window += entries
        self.costs = np.concatenate([self.costs, *(self._cost(entry)[None] for entry in entries)])

    def _shuffle(self, epoch: int) -> np.ndarray:
        key = (self._config.seed, zlib.crc32(self.name.encode()), epoch, _ORDER, _ORDER)
        return np.random.default_rng(key).permutation(self._usable)

    def _cost(self, entry: Entry) -> np.ndarray:
        items = self._table.record(entry.index)
        draws = draw(items[:, 0], self._config, group=self._group, epoch=entry.epoch, index=entry.index)
        return items[draws.chosen[draws.keep], 1:].sum(axis=0, dtype=np.int64)


class _Draft:
    """A pack being planned."""

    def __init__(self, free: np.ndarray, scale: np.ndarray):
        self.free, self._scale = free, scale
        self.entries: list[Entry] = []
        self.opened: set[str] = set()   # groups that have a record in this pack
        self.blocked: set[str] = set()  # groups whose oldest record found no room

    def take(self, queue: _Queue) -> bool:
        """Takes the group's oldest fitting record; once it has one here, its largest fitting."""
        fits = (queue.costs <= self.free).all(axis=1)
        if not fits[0]:
            self.blocked.add(queue.name)
        if not fits.any():
            return False
        size = (queue.costs * self._scale).sum(axis=1)
        position = int(np.argmax(np.where(fits, size, -1) if queue.name in self.opened else fits))
        entry, cost = queue.take(position)
        self.entries.append(entry)
        self.opened.add(queue.name)
        self.free -= cost
        return True


class Planner:
    """The endless plan: `planner[i]` is pack i. Safe for many threads.

    Any position can be reached: packs are planned in chunks, the states at the start of the last
    few chunks are kept, and any other chunk is reached by planning the ones before it. That costs
    up to a millisecond a pack, so a long run keeps a journal of states to resume from.
    """

    def __init__(self, config: DataConfig, tables: Mapping[str, CostTable], *,
                 journal: pathlib.Path | None = None, keep_journal: bool = True):
        """Args:
            tables: the costs of each group's records.
            journal: file of states to resume from; its name must change with the plan.
            keep_journal: append to it; for one process among many.

        Raises: ValueError if a group has no usable record, or if not even the smallest records of
            the mandatory groups fit one pack together.
        """
        self._config = config
        self._budget = np.array(budget(config), np.int64)
        # Fill is compared in integers: a float sum may round differently on another machine.
        self._scale = 2**32 // np.maximum(self._budget, 1)
        self._groups = {group.name: group for group in config.groups}
        self._tables = tables
        self._queues = {name: _Queue(group, tables[name], config) for name, group in self._groups.items()}
        self._mandatory = [group.name for group in config.groups if group.is_mandatory]
        self._weights = {group.name: group.weight for group in config.groups if group.weight > 0}
        self._taken = dict.fromkeys(self._weights, 0)    # by weight, mandatory records aside
        self._refused = dict.fromkeys(self._mandatory, 0)  # packs with no room for a second one
        self._check_mandatory(tables)
        self._states = {0: self._state()}
        self._journal = journal if keep_journal else None
        self._journalled = _read_journal(journal) if journal else {}
        self._chunks: dict[int, list[Pack]] = {}  # several: readers ahead, statistics behind
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Pack:
        number, offset = divmod(index, CHUNK)
        with self._lock:
            if number not in self._chunks:
                self._plan_to(number)
            return self._chunks[number][offset]

    def draws(self, entry: Entry) -> Draws:
        """The randomness of a planned sample, the same that its cost was planned with."""
        kinds = self._tables[entry.group].record(entry.index)[:, 0]
        return draw(kinds, self._config, group=self._groups[entry.group], epoch=entry.epoch, index=entry.index)

    def _plan_to(self, number: int) -> None:
        states = self._journalled | self._states
        start = max(state for state in states if state <= number)
        self._restore(states[start])
        for current in range(start, number + 1):
            packs = [self._plan_pack() for _ in range(CHUNK)]
            self._keep(current + 1)
        self._chunks[number] = packs
        if len(self._chunks) > _KEPT_CHUNKS:
            self._chunks.pop(min(self._chunks, key=lambda known: (known == number, known)))

    def _plan_pack(self) -> Pack:
        draft = _Draft(self._budget.copy(), self._scale)
        overdue = [name for name, queue in self._queues.items()
                   if queue.passed_over >= self._config.patience]
        for name in overdue:
            if draft.take(self._queues[name]) and name not in self._mandatory:
                self._taken[name] += 1
        for name in self._mandatory:
            if name not in draft.opened:
                draft.take(self._queues[name])
        by_weight = set()
        while name := next((due for due in self._due() if draft.take(self._queues[due])), None):
            self._taken[name] += 1
            by_weight.add(name)
        self._settle(draft, by_weight)
        used = self._budget - draft.free
        return Pack(tuple(draft.entries), Cost(*(int(tokens) for tokens in used)))

    def _settle(self, draft: "_Draft", by_weight: set[str]) -> None:
        """Keeps account of who found no room, so that nobody waits for ever."""
        for name in draft.blocked:
            self._queues[name].passed_over += 1
        for name in by_weight & self._refused.keys():
            self._refused[name] = 0
        first = next(iter(self._due()), None)
        if first in self._refused and first not in by_weight:
            # All others wait for this group's turn, but a pack may have no room for a second record
            # of it: after a while, the one that is mandatory counts as the turn.
            self._refused[first] += 1
            if self._refused[first] >= self._config.patience:
                self._taken[first] += 1

    def _due(self) -> list[str]:
        """Groups that may give a record, most overdue first.

        Only a lead of `mixture_slack` records over the mixture is allowed: without that bound, the
        streams left over in every pack would be filled with records of the smallest mode.
        """
        share = {name: self._taken[name] / weight for name, weight in self._weights.items()}
        least = min(share.values(), default=0.0)
        return [name for name in sorted(share, key=share.get)
                if (share[name] - least) * self._weights[name] <= self._config.mixture_slack]

    def _check_mandatory(self, tables: Mapping[str, CostTable]) -> None:
        least = np.zeros(len(Cost._fields), np.int64)
        for name in self._mandatory:
            table = tables[name]
            sums = [table.record(i)[:, 1:].sum(axis=0) for i in range(len(table))
                    if len(table.record(i))]
            least += np.min(sums, axis=0)
        if (least > self._budget).any():
            raise ValueError(f"the mandatory groups {self._mandatory} need at least "
                             f"{Cost(*least.tolist())} together, but a pack holds "
                             f"{budget(self._config)}; raise the budgets")

    def _keep(self, number: int) -> None:
        """Remembers the state at the start of chunk `number`."""
        self._states[number] = self._state()
        if number > _KEPT_STATES:
            self._states.pop(number - _KEPT_STATES, None)
        if self._journal and number % _JOURNALLED == 0 and number not in self._journalled:
            self._journalled[number] = self._states[number]
            with open(self._journal, "a", encoding="utf-8") as file:
                file.write(json.dumps([number, self._states[number]]) + "\n")

    def _state(self) -> tuple:
        queues = {name: queue.state() for name, queue in self._queues.items()}
        return dict(self._taken), dict(self._refused), queues

    def _restore(self, state: tuple) -> None:
        taken, refused, queues = state
        self._taken, self._refused = dict(taken), dict(refused)
        for name, queue in self._queues.items():
            queue.restore(queues[name])


def _read_journal(path: pathlib.Path) -> dict[int, tuple]:
    """The states by chunk. A line torn by a kill is left out; packs are then planned again."""
    states = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            number, state = json.loads(line)
        except ValueError:
            continue
        states[number] = state
    return states
