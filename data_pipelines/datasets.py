"""A group of a data set as records, whatever kind they are and whichever format holds them."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from data_pipelines.array_records import ArrayRecordSource
from data_pipelines.bagel_records import parse_editing, parse_text_to_image, parse_vision_language
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.layout import INFO
from data_pipelines.lines import IMAGES, Folder, JsonLines
from data_pipelines.records import Limits, Record, parse_conversation
from data_pipelines.sources import ParquetRows
from data_pipelines.tables import ParquetTable, open_parquet

# The columns of each kind that is stored in parquet.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "conversation": {"conversation": "string"},
    "text_to_image": {"image": "binary", "captions": "string"},
    "editing": {"image_list": "list<binary>", "instruction_list": "list<list<string>>"},
}


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
    common = dict(mode=group.name, limits=Limits(config.unknown_role, config.max_text_chars,
                                                 config.max_image_bytes))
    if (folder / INFO).is_file() and group.kind == "conversation":
        return ArrayRecordSource(folder, **common)
    _check_kind(folder, group)
    if group.kind == "vision_language":
        images = Folder(folder / IMAGES)
        return _Parsed(JsonLines(folder), lambda line: parse_vision_language(
            line.data, folder=images, place=line.place, **common))
    if group.kind == "conversation":
        return _Parsed(ParquetRows(folder, cache_mib=config.cache_mib), lambda row: parse_conversation(
            row.text, place=row.place, **common))
    parse = parse_text_to_image if group.kind == "text_to_image" else parse_editing
    return _Parsed(ParquetTable(folder, COLUMNS[group.kind], cache_mib=config.cache_mib), lambda row: parse(
        **row.values, place=row.place, **common))


class _Parsed:
    """Rows of any format, each parsed when it is asked for."""

    def __init__(self, rows: ParquetRows | ParquetTable | JsonLines, parse: Callable[[Any], Record]):
        self._rows, self._parse = rows, parse
        self.digest = rows.digest

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._parse(self._rows[index])


def _check_kind(folder: pathlib.Path, group: GroupConfig) -> None:
    """Looks at one file. Raises: ValueError if it is of another kind than the group's."""
    has_lines = any(folder.glob("*.jsonl"))
    if has_lines and group.kind == "vision_language":
        return  # and do not search its images
    example = min(folder.rglob("*.parquet"), default=None)
    if example is None:
        kind, found = "vision_language" if has_lines else None, "JSONL files"
    else:
        with open_parquet(example) as file:
            names = file.schema_arrow.names
        kind = next((kind for kind, columns in COLUMNS.items() if columns.keys() <= set(names)), None)
        found = f"the columns {names}"
    if kind is not None and kind != group.kind:
        wanted = f"the columns {list(COLUMNS[group.kind])}" if group.kind in COLUMNS else "JSONL files"
        raise ValueError(f"{example or folder}: group {group.name!r} is of kind {group.kind!r}, which needs "
                         f"{wanted}, but here are {found}; set its kind to {kind!r}")
