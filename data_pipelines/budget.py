"""Chooses the budgets of a pack: the sizes of the three streams that leave the least padding.

    python -m data_pipelines.budget --config configs/irgl_stage2.py --simulate
    python -m data_pipelines.budget --config configs/shapes_stage1.py --tokens 1024 --multiple 16

It plans packs under many budgets and prints the best for a few total sizes, then those of --tokens as
overrides for training. Images come in few sizes, so fill jumps with the budgets: five images of 4,096
tokens want 20,480, and none less. Budgets are multiples of 128, the lanes of a TPU; attention fills streams up
to whole tiles by itself.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.choices import largest
from data_pipelines.config import DataConfig, from_config_dict
from data_pipelines.costs import CostTable, budget, find_oversize, measure_costs
from data_pipelines.datasets import open_source
from data_pipelines.faults import BadRecords
from data_pipelines.planning import Planner
from data_pipelines.samples import Cost
from data_pipelines.simulation import simulate
from data_pipelines.tokenizer import Tokenizer

TOTALS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of --tokens
_RECORDS = 4096     # of each group that the search looks at
_ANY_IMAGES = 4096  # more than a pack can hold
_GRID = 12          # evenly spaced sizes of a stream, besides those that suit the images
_REFINED = 4        # of the coarse search's best


class Choice(NamedTuple):
    """Budgets, and what planned packs make of them."""

    budgets: Cost
    fill: float                # of the three streams together
    streams: tuple[float, ...] # of each
    records: float             # a pack

    @property
    def tokens(self) -> int:
        return sum(self.budgets[:3])


class Search:
    """Looks for good budgets for one mixture."""

    def __init__(self, config: DataConfig, tables: Mapping[str, CostTable], *, packs: int = 200,
                 multiple: int = 128):
        """Args: packs planned for each choice; budgets are multiples of `multiple` tokens."""
        self._config, self._packs, self._multiple = config, packs, multiple
        self._tables = {name: _thin_out(table) for name, table in tables.items()}
        items = np.concatenate([table.items for table in self._tables.values()])
        self._sizes = {"vit": _common_sizes(items[:, 2]), "latent": _common_sizes(items[:, 3])}
        # All but one in a thousand must fit; a single giant shall not decide.
        wholes = np.concatenate([_record_costs(self._tables[group.name], group.kind)
                                 for group in config.groups])
        self._least = [self._round_up(tokens) for tokens in np.quantile(wholes, 0.999, axis=0)[:3]]
        self._known: dict[tuple[int, ...], Choice | None] = {}

    def measure(self, text: int, vit: int, latent: int, *, packs: int | None = None) -> Choice | None:
        """Plans packs under these budgets; None if records do not fit."""
        key = (text, vit, latent, packs or self._packs)
        if key not in self._known:
            self._known[key] = self._measure(*key) if all(np.array(key[:3]) >= self._least) else None
        return self._known[key]

    def best(self, total: int) -> Choice:
        """The fullest budgets of at most `total` tokens together.

        Raises: ValueError if the records do not fit into so few.
        """
        pairs = tqdm(list(self._pairs(total)), f"{total} tokens", leave=False, disable=None)
        coarse = [choice for vit, latent in pairs
                  if (choice := self._choose_text(total, vit, latent, packs=-(-self._packs // 5)))]
        coarse.sort(key=lambda choice: choice.fill, reverse=True)
        starts = filter(None, (self.measure(*choice.budgets[:3]) for choice in coarse))
        found = [self._climb(start, total) for start in itertools.islice(starts, _REFINED)]
        if not found:
            raise ValueError(f"no budgets of {total} tokens together hold a record of each mandatory group and "
                             f"beside them one of any group, with {self._least} tokens of text, ViT and latent "
                             "at least; raise --tokens, or drop is_mandatory from a group")
        return max(found, key=lambda choice: choice.fill)

    def _measure(self, text: int, vit: int, latent: int, packs: int) -> Choice | None:
        config = dataclasses.replace(self._config, text_tokens=text, vit_tokens=vit, latent_tokens=latent,
                                     images=_ANY_IMAGES, index_dir="", max_tokens_per_record=2**31)
        tables = {}
        for group in config.groups:
            table = self._tables[group.name]
            oversize = [index for index, _ in find_oversize(table, group=group, config=config)]
            tables[group.name] = table.without(oversize, ())
        try:
            planner = Planner(config, tables)
        except ValueError:  # the mandatory records do not fit one pack, or a group is left empty
            return None
        # The first packs choose from windows in which nothing was passed over yet.
        planned = [planner[index] for index in range(packs // 2, packs + packs // 2)]
        mandatory = {group.name for group in config.groups if group.is_mandatory}
        if any(mandatory - {entry.group for entry in pack.entries} for pack in planned):
            return None  # some record fits beside no choice of them
        costs = np.array([pack.cost for pack in planned])
        sizes, used = np.array([text, vit, latent]), costs[:, :3].mean(axis=0)
        return Choice(budgets=Cost(text, vit, latent, int(costs[:, 3].max())),
                      fill=float(used.sum() / sizes.sum()),
                      streams=tuple((used / np.maximum(sizes, 1)).tolist()),
                      records=float(np.mean([len(pack.entries) for pack in planned])))

    def _pairs(self, total: int) -> Iterator[tuple[int, int]]:
        """ViT and latent budgets near the ratio in which the mixture uses them."""
        wide = self.measure(*[max(total, least) for least in self._least], packs=20)
        if wide is None:
            return
        used = np.array(wide.streams) * wide.budgets[:3]
        share = used / used.sum()
        room = total - self._least[0]
        for vit in self._candidates("vit", room):
            for latent in self._candidates("latent", room - vit):
                is_large = 0.6 <= (vit + latent) / total + share[0] <= 1
                wanted = share[1] * latent  # of share[2] * vit; 0 if the mixture lacks one of them
                if is_large and (0.7 * wanted <= share[2] * vit <= 1.4 * wanted or not wanted):
                    yield vit, latent

    def _candidates(self, field: str, most: int) -> list[int]:
        """Sizes of a stream: whole numbers of its common images, and an even grid."""
        least = self._least[Cost._fields.index(field)]
        if not len(self._sizes[field]):
            return [0]
        sizes = {self._round_up(count * size)
                 for size in self._sizes[field] for count in range(1, most // size + 1)}
        sizes |= {self._round_up(value) for value in np.linspace(least, max(most, least), _GRID)}
        return sorted(size for size in sizes if least <= size <= most)

    def _choose_text(self, total: int, vit: int, latent: int, *, packs: int) -> Choice | None:
        """The text budget that suits the other two."""
        most = (total - vit - latent) // self._multiple * self._multiple
        free = self.measure(most, vit, latent, packs=packs)
        if free is None:
            return None
        used = free.streams[0] * free.budgets.text
        sizes = {self._round_up(used * spare) for spare in (1.02, 1.08, 1.15)}
        choices = [self.measure(max(text, self._least[0]), vit, latent, packs=packs)
                   for text in sizes if text <= most]
        return max([free, *filter(None, choices)], key=lambda choice: choice.fill)

    def _climb(self, choice: Choice, total: int) -> Choice:
        """Goes to the best neighbour until there is none."""
        while True:
            neighbours = []
            for stream in range(3):
                for step in (-2, -1, 1, 2):
                    sizes = list(choice.budgets[:3])
                    sizes[stream] += step * self._multiple
                    if sizes[stream] > 0 and sum(sizes) <= total and (other := self.measure(*sizes)):
                        neighbours.append(other)
            best = max(neighbours, key=lambda other: other.fill, default=choice)
            if best.fill <= choice.fill:
                return choice
            choice = best

    def _round_up(self, tokens: float) -> int:
        return int(-(-tokens // self._multiple)) * self._multiple


def _thin_out(table: CostTable) -> CostTable:
    """At most _RECORDS records with items, evenly chosen."""
    usable = np.diff(table.offsets).nonzero()[0]
    chosen = usable[np.linspace(0, len(usable) - 1, min(len(usable), _RECORDS)).astype(int)]
    records = [table.record(index) for index in chosen]
    return CostTable(np.concatenate(records or [table.items[:0]]), np.cumsum([0, *map(len, records)]))


def _record_costs(table: CostTable, kind: str) -> np.ndarray:
    """int64 [R, 4]: the most that a sample of each record may cost in each stream, before dropout."""
    costs = [largest(kind, table.record(index)).max(axis=0) for index in range(len(table))]
    return np.array(costs, np.int64).reshape(-1, len(Cost._fields))


def _common_sizes(tokens: np.ndarray) -> np.ndarray:
    """The two image sizes that most items have."""
    sizes, counts = np.unique(tokens[tokens > 0], return_counts=True)
    return sizes[np.argsort(-counts, kind="stable")[:2]]


def _read_tables(config: DataConfig, tokenizer: str, init_from: str) -> dict[str, CostTable]:
    path = pathlib.Path(tokenizer or pathlib.Path(init_from, "tokenizer.json"))
    if not path.is_file():
        raise ValueError(f"no tokenizer in {str(path)!r}; pass --tokenizer FILE, or --simulate for assumed "
                         "lengths")
    encoder = Tokenizer.from_file(str(path))
    sources = {group.name: open_source(config, group) for group in config.groups}
    bad = BadRecords({name: len(source) for name, source in sources.items()}, config.max_bad_share)
    return {group.name: measure_costs(sources[group.name], group=group, config=config, tokenizer=encoder,
                                      bad=bad) for group in config.groups}


def _row(choice: Choice) -> str:
    streams = " ".join(f"{fill:7.1%}" for fill in choice.streams)
    budgets = " ".join(f"{size:7d}" for size in choice.budgets)
    return f"{choice.tokens:7d} {budgets} {choice.fill:7.1%} {streams} {choice.records:8.1f}"


def main(values: Any) -> None:
    if "data" not in values.config:
        raise ValueError("the config has no field data; give the config of a training stage")
    config = from_config_dict(DataConfig, values.config.data, path="data")
    if values.simulate:
        tables = simulate(config)
    else:
        tables = _read_tables(config, values.tokenizer or "", str(values.config.get("init_from", "")))
    search = Search(config, tables, packs=values.packs, multiple=values.multiple)
    names = ("tokens", "text", "vit", "latent", "images", "fill", "text", "vit", "latent")
    print("\n" + " ".join(f"{name:>7}" for name in names), " records")
    for share in TOTALS:
        total = int(share * values.tokens) // values.multiple * values.multiple
        try:
            print(_row(search.best(total)), flush=True)
        except ValueError:
            print(f"{total:7d} hold no pack", flush=True)
    now = search.measure(*budget(config)[:3])
    print(f"\nthe config's budgets: {f'{now.fill:.1%}' if now else 'hold no pack of every group'}")
    best = search.best(values.tokens)
    print(f"for --tokens {values.tokens}:", *(f"--config.data.{name}={size}" for name, size in zip(
        ("text_tokens", "vit_tokens", "latent_tokens", "images"), best.budgets)))


if __name__ == "__main__":
    command.define_config("The configuration of a training stage.")
    flags.DEFINE_integer("tokens", 40960, "Most tokens of a pack, all streams together.", lower_bound=1)
    flags.DEFINE_integer("multiple", 128, "Every budget is a multiple of this.", lower_bound=1)
    flags.DEFINE_integer("packs", 200, "Packs that are planned for each choice.", lower_bound=1)
    flags.DEFINE_bool("simulate", False, "Assume the lengths of simulation.py instead of reading the data set.")
    flags.DEFINE_string("tokenizer", None, "A tokenizer.json; by default that of the config's init_from.")
    flags.mark_flags_as_required(["config"])
    command.run(main)
