"""A pack made ready to draw: bars of the streams, its samples item by item, rasters of who sees whom."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import Rows
from data_pipelines.costs import budget
from data_pipelines.pipeline import Packs
from data_pipelines.planning import Entry
from data_pipelines.samples import Kind
from data_pipelines.show_page.drawing import cell_edges, embed_picture, embed_raster, visibility
from data_pipelines.show_page.reading import STREAMS, Block, Tokens, order_tokens, read_samples
from data_pipelines.show_page.records import clip
from data_pipelines.tokenizer import Tokenizer

PALETTE = 8            # colours of samples; the ninth sample has the first again
MAX_SAMPLES = 40       # of a pack told item by item; all are in its bars
MAX_PICTURES = 60      # of a pack shown
MAX_ITEM_CHARS = 160
MAX_FAULTS, MAX_FAULT_CHARS = 5, 500
COLORS = {             # of keys in a raster; the same as in the style sheet
    Kind.TEXT: (127, 143, 163), Kind.VIT: (150, 112, 190), Kind.CLEAN: (63, 143, 152),
    Kind.NOISED: (214, 110, 62), Kind.SYSTEM: (127, 143, 163)}


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens in a bar; left and width in percent."""

    left: float
    width: float
    style: str
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One stream, as long as its budget; `learned` are the runs that carry loss."""

    name: str
    used: int
    budget: int
    num_learned: int
    segments: tuple[Segment, ...]
    learned: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class ItemView:
    """One item of a sample; a dropped one has no content."""

    kind: str
    tokens: int
    dropped: bool = False
    learned: bool = False
    text: str = ""
    picture: str = ""
    noise: float | None = None  # share of noise before the shift of training


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A sample; `place` names the record it is made of, as far as that is known."""

    number: int
    style: str
    group: str
    place: str
    tokens: int
    items: tuple[ItemView, ...]


@dataclasses.dataclass(frozen=True)
class Raster:
    """Who sees whom; `kinds` and `samples` are strips along its edges, in percent of its side."""

    uri: str
    count: int
    kinds: tuple[Segment, ...]
    samples: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class PackView:
    """All that the page draws of one pack."""

    index: int
    bars: tuple[Bar, ...]
    time: Raster
    near: Raster          # of one sample
    near_sample: SampleView
    samples: tuple[SampleView, ...]
    num_samples: int
    faults: tuple[str, ...]
    num_dropped: int


class Planned(NamedTuple):
    """An item as the plan has it."""

    kind: Kind
    tokens: int
    keep: bool


def view_pack(packs: Packs, index: int, tokenizer: Tokenizer) -> PackView:
    """Reads pack `index` from its arrays, and from the plan what was dropped.

    Raises: ValueError if not one of its records can be read.
    """
    pack, faults = packs.load(index)
    tokens = order_tokens(pack)
    samples = read_samples(pack, tokens, packs.config, tokenizer)
    if not samples:
        raise ValueError(f"pack {index} is empty: none of its records can be read")
    entries = [(entry, _plan(packs, entry)) for entry in packs.planner[index].entries]
    replaced = {fault.group for fault in faults}
    reasons = list(dict.fromkeys(fault.reason for fault in faults))
    views, pictures = [], 0
    for number, (blocks, (entry, planned)) in enumerate(zip(samples, match_entries(samples, entries))):
        views.append(_view_sample(number, blocks, planned, with_pictures=pictures < MAX_PICTURES,
                                  names=_name(entry, replaced)))
        pictures += sum(block.kind != Kind.TEXT for block in blocks)
    near = max(range(len(samples[:MAX_SAMPLES])),
               key=lambda i: (len({block.kind for block in samples[i]}), views[i].tokens))
    return PackView(
        index=index, bars=_draw_bars(tokens, samples, budget(packs.config)),
        time=_draw_raster(tokens, samples, np.arange(len(samples))),
        near=_draw_raster(tokens, samples, np.array([near])), near_sample=views[near],
        samples=tuple(views[:MAX_SAMPLES]), num_samples=len(views),
        faults=tuple(clip(reason, MAX_FAULT_CHARS)[0] for reason in reasons[:MAX_FAULTS]),
        num_dropped=sum(item.dropped for view in views for item in view.items))


def match_entries(samples: Sequence[Sequence[Block]], entries: Sequence[tuple[Entry, list[Planned]]],
                  ) -> list[tuple[Entry | None, list[Planned]]]:
    """For each sample the entry it was planned as, with its items; None if it is another record's.

    A pack may lack a record that cannot be read, or hold another in its place. Samples come in the
    order of their entries, and are known by the kinds and tokens of their items.
    """
    waiting = [(entry, items) for entry, items in entries if any(item.keep for item in items)]
    matched: list[tuple[Entry | None, list[Planned]]] = []
    for blocks in samples:
        wanted = [(block.kind, block.num_tokens) for block in blocks]
        found = next((i for i, (_, items) in enumerate(waiting)
                      if [(item.kind, item.tokens) for item in items if item.keep] == wanted), None)
        if found is None:
            matched.append((None, [Planned(kind, count, True) for kind, count in wanted]))
            continue
        matched.append(waiting[found])
        waiting = waiting[found + 1:]
    return matched


def _name(entry: Entry | None, replaced: set[str]) -> tuple[str, str]:
    """The group and the place of a sample; a stand-in may look like the record it replaces."""
    if entry is None:
        return "a record in another's place", ""
    return entry.group, "" if entry.group in replaced else f"record {entry.index}, epoch {entry.epoch}"


def _plan(packs: Packs, entry: Entry) -> list[Planned]:
    rows, draws = packs.tables[entry.group].record(entry.index), packs.planner.draws(entry)
    # In a pack a system prompt is a text like any other.
    kinds = np.where(rows[:, 0] == Kind.SYSTEM, Kind.TEXT, rows[:, 0])
    return [Planned(Kind(kinds[i]), int(rows[i, 1:4].sum()), bool(keep))
            for i, keep in zip(draws.chosen, draws.keep)]


def _view_sample(number: int, blocks: Sequence[Block], planned: Sequence[Planned], *, with_pictures: bool,
                 names: tuple[str, str]) -> SampleView:
    items, realised = [], iter(blocks)
    for item in planned:
        if not item.keep:
            items.append(ItemView(item.kind.name.lower(), item.tokens, dropped=True))
            continue
        block = next(realised)
        has_picture = with_pictures and block.picture is not None
        items.append(ItemView(
            block.kind.name.lower(), block.num_tokens, learned=block.num_learned > 0,
            text=clip(block.text, MAX_ITEM_CHARS)[0],
            picture=embed_picture(block.picture) if has_picture else "",
            noise=1 / (1 + math.exp(-block.timestep)) if block.kind == Kind.NOISED else None))
    count = sum(block.num_tokens for block in blocks)
    return SampleView(number + 1, _style(number), *names, count, tuple(items))


def _draw_bars(tokens: Tokens, samples: Sequence[Sequence[Block]], full: Sequence[int]) -> tuple[Bar, ...]:
    bars = []
    for stream, name in enumerate(STREAMS):
        if full[stream] == 0:
            continue
        segments = []
        for number, blocks in enumerate(samples):
            label = str(number + 1)
            for block in blocks:
                mine = slice(block.start, block.stop)
                index = tokens.index[mine][tokens.stream[mine] == stream]
                bracket = stream == 0 and block.kind != Kind.TEXT
                for segment in _segments(index, full[stream], f"{_style(number)}{' bracket' * bracket}"):
                    fits = not bracket and segment.width > 2.6
                    segments.append(dataclasses.replace(segment, label=label if fits else ""))
                    label = "" if fits else label
        learned = tokens.index[(tokens.stream == stream) & tokens.learned]
        bars.append(Bar(name, int((tokens.stream == stream).sum()), int(full[stream]), len(learned),
                        tuple(segments), tuple(_segments(learned, full[stream], "learned"))))
    return tuple(bars)


def _draw_raster(tokens: Tokens, samples: Sequence[Sequence[Block]], chosen: np.ndarray) -> Raster:
    """The raster of the chosen neighbouring samples, and the strips that say what lies where."""
    blocks = [(number, block) for number in chosen for block in samples[number]]
    start, stop = blocks[0][1].start, blocks[-1][1].stop
    count = stop - start
    kinds = np.concatenate([np.full(block.num_tokens, block.kind) for _, block in blocks])
    edges = cell_edges(count)
    middles = (edges[:-1] + edges[1:] - 1) // 2
    colors = np.array([COLORS[kind] for kind in Kind], np.uint8)[kinds[middles]]
    shares = visibility(Rows(*(row[start:stop] for row in tokens.rows)))
    place = lambda a, b, style, label: Segment(100 * (a - start) / count, 100 * (b - a) / count, style, label)
    strips = [place(block.start, block.stop, block.kind.name.lower(), str(i + 1))
              for i, (_, block) in enumerate(blocks)]
    spans = [place(samples[i][0].start, samples[i][-1].stop, _style(int(i)), str(i + 1)) for i in chosen]
    return Raster(embed_raster(shares, colors), count, tuple(strips), tuple(spans))


def _segments(index: np.ndarray, full: int, style: str) -> list[Segment]:
    """Neighbouring places as runs."""
    index = np.sort(index)
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []
    return [Segment(100 * int(run[0]) / full, 100 * len(run) / full, style) for run in runs]


def _style(number: int) -> str:
    return f"s{number % PALETTE}"
