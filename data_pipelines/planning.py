"""Which records share a pack: planned ahead from their costs, never improvised while reading.

Each group (learning mode) is an endless queue, its records in a new random order every epoch. A pack
takes one record of every mandatory group, then fills up by group weights from the next `lookahead`
records of each group. Several drafts of a pack are made side by side and the fullest is taken.

The requested mixture: every mandatory group has one record in every pack, and all other records, of
mandatory groups too, are drawn in proportion to the weights, as in the original. A group that is
`mixture_slack` records (of the heaviest group; of others as many fewer as they weigh less) ahead of the
group furthest behind waits for it.

Nobody is starved. Once `lookahead` packs with a record of its group went without it, the oldest record is
overdue: no other of its group is drawn by weight before it, and that of a mandatory group goes ahead of the
other mandatory ones. If the group furthest behind finds no room in `patience` packs, its record opens the
next, ahead of the mandatory ones, and a mandatory group's own record counts both ways. A mandatory group of
which nothing fits beside those ahead of it is left out of that pack.

The plan depends on the costs and the config alone, so every process, however many there are, makes the
same one, and a position in it is an integer. It is made from the beginning, PACKS packs at a time, and
kept: in memory (about 150 bytes a pack) and, given a file, on disk, where the next run goes on from.
"""

import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.costs import CostTable, budget
from data_pipelines.plan_index import PACKS, Block, PlanIndex
from data_pipelines.queues import Entry, Queue, Windows
from data_pipelines.samples import Cost, Draws, draw

_DRAFTS = 8          # of a pack
_RANDOM_TAKES = 3    # most records that a draft takes at random before it takes the largest
_STREAMS = 3         # the first fields of Cost, those that are tokens
_LATEST = 2**60      # beyond every place in a queue


class Pack(NamedTuple):
    """The records of one pack, in order, and the tokens they fill."""

    entries: tuple[Entry, ...]
    cost: Cost


class _Turn(NamedTuple):
    """A group that takes a record before the others: that of `slot` if there is one and it fits, else any."""

    group: int
    by_weight: bool
    slot: int | None = None


class _Mixture:
    """Who may be drawn by weight: G groups and the records `taken` of each, mandatory ones aside."""

    def __init__(self, config: DataConfig):
        weights = np.array([group.weight for group in config.groups])
        self._is_drawn = weights > 0
        # Groups that are never drawn count as infinitely far ahead.
        self._per_record = np.divide(1.0, weights, out=np.full(len(weights), np.inf), where=self._is_drawn)
        self._slack = config.mixture_slack * self._per_record.min()
        self.taken = np.where(self._is_drawn, 0, 1)

    def due(self, taken: np.ndarray) -> np.ndarray:
        """bool [..., G]: who may take a record.

        Without that bound, what images leave free in the streams would be filled with the smallest mode.
        """
        shares = taken * self._per_record
        return (shares <= shares.min(axis=-1, keepdims=True) + self._slack) & self._is_drawn

    def last(self) -> int | None:
        """The group furthest behind."""
        return int((self.taken * self._per_record).argmin()) if self._is_drawn.any() else None


class _Drafts:
    """K ways to fill a pack up, drawn side by side; the first takes the oldest and largest, others try luck.

    Slots are numbered group after group, 0 to S = G * L.
    """

    def __init__(self, windows: Windows, mixture: _Mixture, *, free: np.ndarray, luck: np.ndarray):
        """Args: free float32 [4]; luck float32 [K, S], a random number for each slot."""
        drafts, self._length = len(luck), windows.place.shape[1]
        self._mixture, self._luck, self._place = mixture, luck, windows.place.ravel()
        self._cost = windows.cost.reshape(len(windows.cost), -1)
        self._size = self._cost[:_STREAMS].sum(axis=0)
        self._all = np.arange(drafts)
        self.free = free[:, None].repeat(drafts, axis=1)
        self.taken = mixture.taken[None].repeat(drafts, axis=0)
        self.picks: list[tuple[np.ndarray, np.ndarray, bool]] = []
        self._random_left = np.where(self._all > 0, 1 + self._all % _RANDOM_TAKES, 0)
        self._open = (self._cost <= free[:, None]).all(axis=0)[None].repeat(drafts, axis=0)
        self._overdue = windows.overdue()
        self._waits = np.zeros_like(self._open)  # for the overdue record of its group
        for group, slot in self._overdue.items():
            self._waits[:, self._slots(group)] = True
            self._waits[:, slot] = False

    def take_turn(self, turn: _Turn) -> None:
        """A record of one group: its oldest that fits in the first draft, any in the others."""
        group = self._slots(turn.group)
        can = self._open[:, group]
        slots = group.start + np.where(can, self._luck[:, group], -1).argmax(axis=1)
        slots[0] = group.start + np.where(can[0], _LATEST - self._place[group], -1).argmax()
        if turn.slot is not None:
            slots[self._open[:, turn.slot]] = turn.slot
        rows = self._open[self._all, slots].nonzero()[0]
        if len(rows):
            self._take(rows, slots[rows], turn.by_weight)

    def take_by_weight(self) -> bool:
        """A record of any group that is due; False if no draft found one."""
        can = self._open & ~self._waits & self._mixture.due(self.taken).repeat(self._length, axis=1)
        value = self._size
        if (self._random_left > 0).any():
            value = np.where((self._random_left > 0)[:, None], self._luck, self._size)
            self._random_left -= 1
        slots = np.where(can, value, -1).argmax(axis=1)
        rows = can[self._all, slots].nonzero()[0]
        if len(rows):
            self._take(rows, slots[rows], True)
        return bool(len(rows))

    def fullest(self) -> list[tuple[int, bool]]:
        """The slots of the best draft, in order, and whether each is by weight."""
        best = int(self.free[:_STREAMS].sum(axis=0).argmin())
        return [(int(slots[position]), by_weight) for rows, slots, by_weight in self.picks
                for position in (rows == best).nonzero()[0]]

    def _take(self, rows: np.ndarray, slots: np.ndarray, by_weight: bool) -> None:
        """In the drafts `rows`, each its slot."""
        self.picks.append((rows, slots, by_weight))
        self.free[:, rows] -= self._cost[:, slots]
        self._open[rows, slots] = False
        if by_weight:
            self.taken[rows, slots // self._length] += 1
        for group, slot in self._overdue.items():
            self._waits[rows[slots == slot], self._slots(group)] = False
        self._open &= (self._cost[:, None] <= self.free[:, :, None]).all(axis=0)

    def _slots(self, group: int) -> slice:
        return slice(group * self._length, (group + 1) * self._length)


class Planner:
    """The endless plan: `planner[i]` is pack i, for any i. Safe for many threads."""

    def __init__(self, config: DataConfig, tables: Mapping[str, CostTable], *,
                 journal: pathlib.Path | None = None, keep_journal: bool = True):
        """Args:
            tables: the costs of each group's records.
            journal: file of the pack index, see `plan_index`; its name must change with the plan.
            keep_journal: write to it; for one process among many.

        Raises: ValueError if a group has no usable record, or if not even the smallest records of
            the mandatory groups fit one pack together.
        """
        self._config, self._tables = config, tables
        self._groups = {group.name: group for group in config.groups}
        self._budget = np.array(budget(config), np.float32)
        queues = [Queue(group, tables[group.name], config) for group in config.groups]
        self._mandatory = [number for number, group in enumerate(config.groups) if group.is_mandatory]
        self._check_mandatory(queues)
        self._windows = Windows(queues, config.lookahead)
        self._mixture = _Mixture(config)
        self._hunger = np.zeros(len(queues), np.int64)  # packs without room for the group furthest behind
        self._luck = _luck((_DRAFTS, 2 * self._windows.place.size))
        self._index = PlanIndex(journal) if journal else None
        self._is_writer = keep_journal
        self._blocks = list(self._index.blocks) if self._index else []
        if self._blocks:
            self._restore(self._blocks[-1].state)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Pack:
        number, offset = divmod(index, PACKS)
        with self._lock:
            while number >= len(self._blocks):
                self._plan_block()
            block = self._blocks[number]
        rows = block.rows[block.ends[offset - 1] if offset else 0:block.ends[offset]].tolist()
        names = list(self._groups)
        return Pack(tuple(Entry(names[group], epoch, index) for group, epoch, index in rows),
                    Cost(*block.costs[offset].tolist()))

    def draws(self, entry: Entry) -> Draws:
        """The randomness of a planned sample, the same that its cost was planned with."""
        kinds = self._tables[entry.group].record(entry.index)[:, 0]
        return draw(kinds, self._config, group=self._groups[entry.group], epoch=entry.epoch, index=entry.index)

    def _plan_block(self) -> None:
        numbers = {name: number for number, name in enumerate(self._groups)}
        rows, ends, costs = [], [], []
        first = len(self._blocks) * PACKS
        for index in range(first, first + PACKS):
            pack = self._plan_pack(index)
            rows += [(numbers[entry.group], entry.epoch, entry.index) for entry in pack.entries]
            ends.append(len(rows))
            costs.append(pack.cost)
        block = Block(np.array(rows, np.int32).reshape(-1, 3), np.array(ends, np.int32),
                      np.array(costs, np.int32), self._state())
        self._blocks.append(block)
        if self._index and self._is_writer:
            self._index.append(block)

    def _plan_pack(self, index: int) -> Pack:
        free, entries, given, turns = self._budget, [], [], self._turns()
        # What is taken makes room in the windows: a pack of many small records needs several rounds.
        while picks := self._draw_up(free, turns, index):
            for slot, by_weight in picks:
                group = slot // self._config.lookahead
                free = free - self._windows.slot_cost(slot)
                given.append(_Turn(group, by_weight))
                self._mixture.taken[group] += by_weight
            entries += self._windows.take([slot for slot, _ in picks])
            turns = []
        self._windows.finish_round(sorted({turn.group for turn in given}))
        self._settle({turn.group for turn in given if turn.by_weight})
        return Pack(tuple(entries), Cost(*map(int, self._budget - free)))

    def _turns(self) -> list[_Turn]:
        """Groups that found no room for long, then mandatory ones, those with an overdue record first."""
        overdue = self._windows.overdue()
        hungry = np.flatnonzero(self._hunger >= self._config.patience)
        first = hungry[np.argsort(-self._hunger[hungry], kind="stable")].tolist()
        late = [group for group in overdue if group in self._mandatory]
        order = dict.fromkeys([*first, *late, *self._mandatory])
        return [_Turn(group, group in first, overdue.get(group)) for group in order]

    def _draw_up(self, free: np.ndarray, turns: Sequence[_Turn], index: int) -> list[tuple[int, bool]]:
        """The slots of the fullest of several drafts, and whether each is by weight."""
        if not turns and not self._windows.any_fits(free, self._mixture.due(self._mixture.taken)):
            return []
        start = 37 * index % self._luck.shape[1] // 2  # other numbers for the next pack
        luck = self._luck[:, start:start + self._windows.place.size]
        drafts = _Drafts(self._windows, self._mixture, free=free, luck=luck)
        for turn in turns:
            drafts.take_turn(turn)
        while drafts.take_by_weight():
            pass
        return drafts.fullest()

    def _settle(self, by_weight: set[int]) -> None:
        """Keeps account of who found no room, so that nobody waits for ever."""
        self._hunger[list(by_weight)] = 0
        last = self._mixture.last()
        if last is not None and last not in by_weight:
            self._hunger[last] += 1

    def _check_mandatory(self, queues: Sequence[Queue]) -> None:
        least = np.zeros(len(Cost._fields), np.int64)
        for group in self._mandatory:
            least += queues[group].least_cost()
        if (least > self._budget).any():
            names = [group.name for group in self._config.groups if group.is_mandatory]
            raise ValueError(f"the mandatory groups {names} need at least {Cost(*least.tolist())} together, "
                             f"but a pack holds {budget(self._config)}; raise the budgets")

    def _state(self) -> np.ndarray:
        """int64 [s]: all that the next pack depends on."""
        return np.concatenate([self._mixture.taken, self._hunger, self._windows.state()])

    def _restore(self, state: np.ndarray) -> None:
        groups = len(self._groups)
        self._mixture.taken, self._hunger = state[:groups].copy(), state[groups:2 * groups].copy()
        self._windows.restore(state[2 * groups:])


def _luck(shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [0, 1), the same for ever."""
    raw = np.random.Philox(0).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32).reshape(shape)
