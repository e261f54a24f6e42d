"""How full packs are, and how fast they are planned: ours beside the original's greedy packer.

    python -m benchmarks.packing

Both pack the simulated IRGL lengths of `data_pipelines/simulation.py`, in the stage 1 and stage 2
mixtures. Fill is useful tokens over the tokens a step computes: the three streams together for ours, a
static sequence of 40,960 for the original; the limit is 1. Speed is that of one core; planning is bound by
no bandwidth, and a step of two seconds a pack asks for half a pack a second. Prints one JSON object last and
writes it to benchmarks/results/packing.json.
"""

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import machine
from data_pipelines import command
from data_pipelines.config import DataConfig, from_config_dict, load_config
from data_pipelines.costs import CostTable, budget
from data_pipelines.planning import Planner
from data_pipelines.samples import draw_all
from data_pipelines.simulation import simulate, useful_tokens

STATIC = 40_960  # tokens of the original's sequence, padded to one shape
# Found by `python -m data_pipelines.budget --simulate`, see docs/performance.md for each command line; with
# `mandatory`, one record of each such group a pack.
CASES = (
    dict(stage=1, mandatory=True, text=3456, vit=19712, latent=24704),
    dict(stage=1, mandatory=True, text=3968, vit=24576, latent=28800),
    dict(stage=1, mandatory=False, text=2176, vit=14848, latent=16512),
    dict(stage=2, mandatory=True, text=2048, vit=9856, latent=20608),
    dict(stage=2, mandatory=True, text=3072, vit=14720, latent=31488),
    dict(stage=2, mandatory=False, text=2048, vit=9856, latent=20608))


class Size(NamedTuple):
    """Tokens of a record as it is packed, and before dropout, as the original asks whether it fits."""

    used: int
    whole: int


class GreedyPacker:
    """The original's packer as its options describe it.

    A pack begins with one record of each mandatory group, then takes records of groups drawn by weight. A
    record that does not fit goes to a buffer; while the pack is short, the buffer comes first. A pack ends
    when it has the expected tokens, when the buffer is full, or when a record of the buffer does not fit;
    in the last two cases that record is lost.
    """

    def __init__(self, config: DataConfig, tables: Mapping[str, CostTable], *, capacity: int = 40_000,
                 buffer_size: int = 50, prefer_buffer_before: int = 16_384):
        self._capacity, self._buffer_size, self._prefer = capacity, buffer_size, prefer_buffer_before
        self._records = {group.name: _endless(_sizes(tables[group.name], config, group))
                         for group in config.groups}
        self._mandatory = [group.name for group in config.groups if group.is_mandatory]
        self._names = [group.name for group in config.groups]
        weights = np.array([group.weight for group in config.groups])
        self._shares = weights / weights.sum()
        self._rng = np.random.default_rng(config.seed)
        self._buffer: deque[Size] = deque()
        self.lost = 0

    def next_pack(self) -> int:
        """Its tokens."""
        used = sum(next(self._records[name]).used for name in self._mandatory)
        while used < self._capacity:
            is_buffered = used < self._prefer and bool(self._buffer)
            name = None if is_buffered else self._rng.choice(self._names, p=self._shares)
            record = self._buffer.popleft() if is_buffered else next(self._records[name])
            if used + record.whole <= self._capacity:
                used += record.used
            elif is_buffered or len(self._buffer) == self._buffer_size:
                self.lost += 1
                break
            else:
                self._buffer.append(record)
        return used


def _sizes(table: CostTable, config: DataConfig, group: Any) -> list[Size]:
    tokens = useful_tokens(table.items[:, 1:])
    kept = tokens * draw_all(table.items[:, 0], table.offsets, config, group=group, epoch=0)
    return [Size(*pair) for pair in zip(np.add.reduceat(kept, table.offsets[:-1]).tolist(),
                                        np.add.reduceat(tokens, table.offsets[:-1]).tolist())]


def _endless(sizes: list[Size]) -> Iterator[Size]:
    while True:
        yield from sizes


def case_config(*, stage: int, mandatory: bool, text: int, vit: int, latent: int) -> DataConfig:
    config = from_config_dict(DataConfig, load_config(f"configs/irgl_stage{stage}.py").data)
    groups = tuple(dataclasses.replace(group, is_mandatory=group.is_mandatory and mandatory)
                   for group in config.groups)
    return dataclasses.replace(config, groups=groups, text_tokens=text, vit_tokens=vit, latent_tokens=latent,
                               images=64, index_dir="")


def measure_ours(config: DataConfig, tables: Mapping[str, CostTable], packs: int) -> dict[str, Any]:
    """Fill of the three streams, and how far the weights are from the requested ones."""
    planner = Planner(config, tables)
    planned = [planner[index] for index in tqdm(range(packs), "planned", leave=False, disable=None)]
    costs, budgets = np.array([pack.cost for pack in planned]), np.array(budget(config)[:3])
    counts = Counter(entry.group for pack in planned for entry in pack.entries)
    drawn = np.array([counts[group.name] - packs * group.is_mandatory for group in config.groups])
    weights = np.array([group.weight for group in config.groups])
    error = np.abs(drawn / drawn.sum() / (weights / weights.sum()) - 1).max()
    return {"budgets": budgets.tolist(), "images": int(costs[:, 3].max()),
            "fill": round(useful_tokens(costs).sum() / packs / budgets.sum(), 4),
            "streams": (costs[:, :3].mean(axis=0) / budgets).round(4).tolist(),
            "records_per_pack": round(sum(counts.values()) / packs, 3), "largest_weight_error": round(error, 5)}


def measure_greedy(config: DataConfig, tables: Mapping[str, CostTable], packs: int) -> dict[str, Any]:
    """Fill of a static sequence once the buffer has found its level, and the share of records lost."""
    packer = GreedyPacker(config, tables)
    used = [packer.next_pack() for _ in tqdm(range(packs), "greedy", leave=False, disable=None)]
    return {"fill": round(np.mean(used[packs // 5:]) / STATIC, 4), "lost_records_per_pack": packer.lost / packs}


def measure_speed(config: DataConfig, tables: Mapping[str, CostTable], records: int) -> dict[str, Any]:
    """Seconds of one core from the cost tables to a plan of so many records."""
    start, wall, index, planned = time.thread_time(), time.perf_counter(), 0, 0
    planner = Planner(config, tables)
    with tqdm(total=records, desc="speed", leave=False, disable=None) as progress:
        while planned < records:
            count = len(planner[index].entries)
            index, planned = index + 1, planned + count
            progress.update(count)
    seconds = time.thread_time() - start
    return {"records": planned, "packs": index, "cpu_seconds": round(seconds, 2),
            "wall_seconds": round(time.perf_counter() - wall, 2),
            "us_per_record": round(seconds / planned * 1e6, 1), "packs_per_second": round(index / seconds)}


def main(values: Any) -> None:
    cases, about = [], machine.describe("numpy")
    for case in CASES:
        config = case_config(**case)
        tables = simulate(config)
        result = {"stage": case["stage"], "mandatory": case["mandatory"],
                  "ours": measure_ours(config, tables, values.packs),
                  "greedy": measure_greedy(config, tables, values.packs)}
        print(f"stage {case['stage']}{', one of each mandatory group' * case['mandatory']}: ours "
              f"{result['ours']['fill']:.1%} of {sum(result['ours']['budgets'])}, greedy "
              f"{result['greedy']['fill']:.1%} of {STATIC}", flush=True)
        cases.append(result)
    config = case_config(**CASES[0])
    speed = measure_speed(config, simulate(config), values.records)
    machine.keep({"benchmark": "packing", **about, "cases": cases, "speed": speed}, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("packs", 1000, "Packs of each case.", lower_bound=10)
    flags.DEFINE_integer("records", 300_000, "Records of the speed measurement.", lower_bound=1)
    flags.DEFINE_string("out", str(machine.RESULTS / "packing.json"), "The result file.")
    command.run(main)
