"""Records on disk: `<mode>/0000.parquet ...`, pages with checksums.

Column `conversation` is all that training reads; `id`, `licence` and `provenance` (JSON) tell a reader what a
record came from.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data_pipelines.curation.compose import Turn
from data_pipelines.sources import COLUMN

SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in (COLUMN, "id", "licence", "provenance")])


class Row(NamedTuple):
    """One record; the conversation is a list of turns."""

    conversation: list[Turn]
    id: str
    licence: str
    provenance: Mapping[str, Any]


class ModeWriter:
    """Writes the rows of one mode in order; use as a context, whose end completes the last file."""

    def __init__(self, folder: pathlib.Path, *, rows_per_file: int, rows_per_group: int):
        self._folder, self._per_file, self._per_group = folder, rows_per_file, rows_per_group
        self._rows: list[tuple[str, ...]] = []
        self._file: pyarrow.parquet.ParquetWriter | None = None
        self.count = 0

    def __enter__(self) -> "ModeWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._close()

    def add(self, row: Row) -> None:
        """Whole row groups go to disk at once."""
        self._rows.append((json.dumps(row.conversation), row.id, row.licence,
                           json.dumps(row.provenance, sort_keys=True)))
        self.count += 1
        if self.count % self._per_file == 0:
            self._flush()
            self._close()
        elif len(self._rows) == self._per_group:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{(self.count - 1) // self._per_file:04d}.parquet"
            self._file = pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd",
                                                       write_page_checksum=True)
        self._file.write_table(pyarrow.table(list(map(list, zip(*self._rows))), schema=SCHEMA))
        self._rows = []

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
