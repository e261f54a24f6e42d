"""A group of a data set as records, whatever kind they are and whichever format holds them."""

import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from data_pipelines.array_records import ArrayRecordSource
from data_pipelines.bagel_records import parse_editing, parse_text_to_image, parse_vision_language
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.inspection import limits_of
from data_pipelines.layout import IMAGES, INFO
from data_pipelines.lines import Folder, JsonLines
from data_pipelines.records import Limits, Record, parse_conversation
from data_pipelines.sources import COLUMNS, ParquetRows, open_parquet

# Each takes the columns of its kind in their order.
_PARSERS = {"conversation": parse_conversation, "text_to_image": parse_text_to_image, "editing": parse_editing}


class Source(Protocol):
    """Random access to the records of one group; safe for many threads."""

    digest: str   # changes with the files; a run is resumed on the same one only

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises: ValueError naming file, row and part of a record that cannot be read."""


def open_source(config: DataConfig, group: GroupConfig) -> Source:
    """The records of a group: `<source>/<split>/<folder>`, files as released or a built data set.

    The digest of a vision_language group is that of its lines; its images are files that nobody lists.

    Raises: ValueError naming what is missing, empty or broken, or the kind that fits the files better.
    """
    folder = pathlib.Path(config.source, config.split, group.folder or group.name)
    limits = limits_of(config)
    if (folder / INFO).is_file() and group.kind == "conversation":
        return ArrayRecordSource(folder, mode=group.name, limits=limits)
    _check_kind(folder, group)
    rows = (JsonLines(folder, digests=config.digests) if group.kind == "vision_language" else
            ParquetRows(folder, COLUMNS[group.kind], cache_mib=config.cache_mib, digests=config.digests))
    return _Parsed(rows, make_parser(group.kind, folder, mode=group.name, limits=limits))


def make_parser(kind: str, folder: pathlib.Path, *, mode: str, limits: Limits) -> Callable[[Any], Record]:
    """What makes a `Record` of a `Row` or a `Line`, or raises ValueError naming its place.

    Args: folder of the group, whose images the lines of a vision_language group name.
    """
    if kind == "vision_language":
        images = Folder(folder / IMAGES)
        return lambda line: parse_vision_language(line.data, folder=images, place=line.place, mode=mode,
                                                  limits=limits)
    return lambda row: _PARSERS[kind](*row.values, place=row.place, mode=mode, limits=limits)


def find_kind(folder: pathlib.Path) -> tuple[str | None, str]:
    """The kind that the files of a group are of, or None, and what there is; one file is looked at.

    Raises: ValueError if that file is broken.
    """
    has_lines = any(folder.glob("*.jsonl"))
    # Beside lines lie images, perhaps millions, which nobody should search for parquet.
    example = min(folder.glob("*.parquet") if has_lines else folder.rglob("*.parquet"), default=None)
    if example is None:
        return "vision_language" if has_lines else None, "JSONL files" if has_lines else "no parquet file"
    with open_parquet(example) as file:
        names = file.schema_arrow.names
    kind = next((kind for kind, columns in COLUMNS.items() if columns.keys() <= set(names)), None)
    return kind, f"the columns {names} in {example.name}"


class _Parsed:
    """Rows of any format, each parsed when it is asked for."""

    def __init__(self, rows: ParquetRows | JsonLines, parse: Callable[[Any], Record]):
        self._rows, self._parse = rows, parse
        self.digest = rows.digest

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._parse(self._rows[index])


def _check_kind(folder: pathlib.Path, group: GroupConfig) -> None:
    """Raises: ValueError if the files are of another kind than the group."""
    if group.kind == "vision_language" and any(folder.glob("*.jsonl")):
        return
    kind, found = find_kind(folder)
    if kind not in (None, group.kind):
        wanted = f"the columns {list(COLUMNS[group.kind])}" if group.kind in COLUMNS else "JSONL files"
        raise ValueError(f"{folder}: group {group.name!r} is of kind {group.kind!r}, which needs {wanted}, but "
                         f"here are {found}; set its kind to {kind!r}")
