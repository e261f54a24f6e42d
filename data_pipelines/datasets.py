"""A group of a data set as records, whatever kind they are and whichever format holds them."""

import hashlib
import json
import pathlib
from typing import Protocol

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.records import Limits, Record, parse_conversation
from data_pipelines.sources import ParquetRows


class Source(Protocol):
    """Random access to the records of one group; safe for many threads."""

    digest: str   # changes with the files; a run is resumed on the same one only

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises: ValueError naming file, row and part of a record that cannot be read."""


def open_source(config: DataConfig, group: GroupConfig) -> Source:
    """The records of a group: `<source>/<split>/<folder>`.

    Raises: ValueError naming what is missing, empty or broken.
    """
    folder = pathlib.Path(config.source, config.split, group.folder or group.name)
    limits = Limits(config.unknown_role, config.max_text_chars, config.max_image_bytes)
    return ConversationSource(ParquetRows(folder, cache_mib=config.cache_mib), mode=group.name, limits=limits)


class ConversationSource:
    """Records in the released layout: parquet files with a column `conversation`."""

    def __init__(self, rows: ParquetRows, *, mode: str, limits: Limits):
        self._rows, self._mode, self._limits = rows, mode, limits
        self.digest = file_digest(rows.files)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return parse_conversation(row.text, mode=self._mode, place=row.place, limits=self._limits)


def file_digest(files: list[pathlib.Path]) -> str:
    """sha256 of names, sizes and times: tells that files were changed, without reading them."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
