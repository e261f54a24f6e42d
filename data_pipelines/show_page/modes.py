"""What a folder holds: its modes, how many records each has, and how long those are."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from data_pipelines import images
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.datasets import Source, find_kind
from data_pipelines.digests import MANIFEST
from data_pipelines.layout import INFO
from data_pipelines.records import ImagePart, TextPart
from data_pipelines.show_page.drawing import draw_histogram
from data_pipelines.show_page.records import clip

NUM_PROBED = 64  # neighbouring records a mode that are measured where no configuration gives all costs
MAX_NAMED = 5    # bad records of a mode that are named


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One measure over the records of a mode, and the points of its histogram."""

    title: str
    median: float
    low: float       # 5 % of the records lie below
    high: float      # 5 % of the records lie above
    points: str


@dataclasses.dataclass(frozen=True)
class ModeView:
    """One mode: its share of the mixture is None without a configuration."""

    name: str
    kind: str
    count: int
    share: float | None
    is_mandatory: bool
    sizes: tuple[Sizes, ...]
    num_bad: int
    num_oversize: int
    named: tuple[str, ...]


def find_groups(folder: pathlib.Path) -> DataConfig:
    """The folder as a mixture of all it holds: the groups in <folder>/train, or else in <folder>.

    Raises: ValueError if there is no such folder, or nothing in it that a record could be read from.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the folder of a data set")
    for split in ("train", ""):
        base = folder / split
        children = sorted(base.iterdir()) if base.is_dir() else ()
        kinds = {child.name: _guess_kind(child) for child in children
                 if child.is_dir() and not child.name.startswith(".")}
        groups = tuple(GroupConfig(name, kind=kind) for name, kind in kinds.items() if kind)
        if groups:
            return DataConfig(source=str(folder), split=split, groups=groups)
    raise ValueError(f"{str(folder)!r} holds no data set; expected train/<mode>/ or <mode>/ with parquet, "
                     "ArrayRecord or JSONL files")


def _guess_kind(folder: pathlib.Path) -> str | None:
    """The kind of the records in a group's folder; None if there is no file of records."""
    if (folder / INFO).is_file():
        return "conversation"
    # Parquet of other columns is refused by whoever opens it; passed over here, nobody would know.
    return find_kind(folder)[0] or ("conversation" if any(folder.rglob("*.parquet")) else None)


def is_shapes(folder: pathlib.Path) -> bool:
    """Whether the folder's manifest says that `build` made it from the shapes world."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("source") == "shapes"


def view_tables(config: DataConfig, tables: Mapping[str, CostTable]) -> tuple[ModeView, ...]:
    """Modes with the costs of every record, as the planner has them."""
    values, total = {}, sum(group.weight for group in config.groups)
    for name, table in tables.items():
        sums = np.pad(np.cumsum(table.items[:, 1:4], axis=0, dtype=np.int64), ((1, 0), (0, 0)))
        records = np.diff(sums[table.offsets], axis=0)[np.diff(table.offsets) > 0]
        values[name] = dict(zip(("text tokens", "ViT tokens", "latent tokens"), records.T))
    sizes, modes = _draw_sizes(values), []
    for group in config.groups:
        table = tables[group.name]
        modes.append(ModeView(
            group.name, group.kind, len(table), group.weight / total if total else 0.0, group.is_mandatory,
            sizes[group.name], len(table.bad), len(table.oversize), _name(table.bad + table.oversize)))
    return tuple(modes)


def probe_sources(config: DataConfig, sources: Mapping[str, Source]) -> tuple[ModeView, ...]:
    """Modes with the sizes of their first NUM_PROBED records, read from texts and image headers."""
    values, bad = {}, {}
    for name, source in sources.items():
        rows, bad[name] = [], []
        for index in range(min(NUM_PROBED, len(source))):
            try:
                rows.append(_measure(source, index, config))
            except ValueError as error:
                bad[name].append(str(error))
        columns = np.array(rows, float).reshape(-1, 3).T
        values[name] = dict(zip(("letters of text", "pictures", "kilopixels"), columns))
    sizes = _draw_sizes(values)
    return tuple(ModeView(group.name, group.kind, len(sources[group.name]), None, False, sizes[group.name],
                          len(bad[group.name]), 0, _name(tuple(bad[group.name]))) for group in config.groups)


def _measure(source: Source, index: int, config: DataConfig) -> tuple[float, float, float]:
    parts = source[index].parts
    pictures = [images.image_size(part.data, where=part.place, max_pixels=config.max_image_pixels)
                for part in parts if isinstance(part, ImagePart)]
    letters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    return letters, len(pictures), sum(width * height for width, height in pictures) / 1000


def _draw_sizes(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, tuple[Sizes, ...]]:
    """Sizes by mode; a measure has one scale for all modes, so that they compare."""
    titles = next(iter(values.values()))
    highs = {title: max((float(of[title].max()) for of in values.values() if len(of[title])), default=0.0)
             for title in titles}
    sizes = {}
    for mode, of in values.items():
        quantiles = {title: np.quantile(of[title], (0.5, 0.05, 0.95)) if len(of[title]) else (0.0,) * 3
                     for title in titles}
        sizes[mode] = tuple(Sizes(title, *map(float, quantiles[title]), draw_histogram(of[title], highs[title]))
                            for title in titles)
    return sizes


def _name(reasons: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(clip(reason, 500)[0] for reason in reasons[:MAX_NAMED])
