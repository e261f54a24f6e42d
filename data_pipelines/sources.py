"""Random access to the rows of parquet files: `<source>/<split>/<group>/*.parquet`.

Rows are read by row group, a few of which stay in memory. Every page is checked against its
checksum, and every row group against the digest that `check --write` recorded: with neither, most
flipped bytes in a parquet file are silently wrong text.
"""

import bisect
import itertools
import pathlib
import threading
from collections import OrderedDict
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from data_pipelines.digests import (
    FileDigest,
    footer_sha256,
    group_sha256,
    read_recorded,
    stat_digest,
)

COLUMN = "conversation"
_FIX = "restore the file; if it was changed on purpose, run python -m data_pipelines.check --write"


class Row(NamedTuple):
    """The text of one conversation and the file and row it stands in."""

    text: str
    place: str


class RowGroup(NamedTuple):
    """A piece of a parquet file that is read at once."""

    file: pathlib.Path
    index: int      # within its file
    first_row: int  # within its file
    num_rows: int
    num_bytes: int  # unpacked
    sha256: str     # as recorded; empty: nothing is


class ParquetRows:
    """All rows of one group: `len(source)` rows, `source[i]` is a `Row`. Safe for many threads."""

    def __init__(self, folder: str | pathlib.Path, *, cache_mib: int = 256, digests: str | pathlib.Path = ""):
        """Opens the files and compares them with what is recorded of them, row groups excepted.

        Args:
            folder: with parquet files.
            cache_mib: bounds the row groups kept in memory.
            digests: file of `check --write --digests`, if the data set's folder does not hold it.
        Raises: ValueError naming the file that is empty, broken, not as recorded, or has no
            `conversation` column.
        """
        self.folder = pathlib.Path(folder)
        self.files = sorted(self.folder.rglob("*.parquet"))
        if not self.files:
            raise ValueError(f"no parquet file in {str(self.folder)!r}; build the data set first "
                             "(python -m data_pipelines.build) or correct source, split and groups")
        recorded = read_recorded(self.folder, self.files, digests=digests)
        self.digest = recorded.content or stat_digest(self.files)
        self._groups = [group for file in self.files for group in list_row_groups(
            file, recorded.files.get(file.relative_to(self.folder).as_posix()))]
        self._ends = list(itertools.accumulate(group.num_rows for group in self._groups))
        self._cache: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._cache_bytes = cache_mib * 2**20
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        group = self._groups[number]
        offset = index - (self._ends[number] - group.num_rows)
        return row_text(self._read(number), group, offset)

    def _read(self, number: int) -> pyarrow.ChunkedArray:
        with self._lock:
            if number not in self._cache:
                self._cache[number] = read_row_group(self._groups[number])
                while (len(self._cache) > 1 and
                       sum(column.nbytes for column in self._cache.values()) > self._cache_bytes):
                    self._cache.popitem(last=False)
            self._cache.move_to_end(number)
            return self._cache[number]


def list_row_groups(path: pathlib.Path, recorded: FileDigest | None = None) -> list[RowGroup]:
    """The row groups of a file that have rows.

    Raises: ValueError if the file is broken, empty, not as recorded, or has no `conversation` column.
    """
    if recorded and footer_sha256(path) != recorded.footer:
        raise ValueError(f"{path}: the footer is not the one that was recorded; {_FIX}")
    with _open(path) as file:
        field = file.schema_arrow.field(COLUMN) if COLUMN in file.schema_arrow.names else None
        if field is None:
            raise ValueError(f"{path}: no column {COLUMN!r}; it has {file.schema_arrow.names}")
        if not (pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)):
            raise ValueError(f"{path}: column {COLUMN!r} holds {field.type}; expected JSON strings")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        counts = [group.num_rows for group in groups]
        sizes = [group.total_byte_size for group in groups]
    if sum(counts) == 0:
        raise ValueError(f"{path}: the parquet file has no rows")
    if recorded and len(recorded.groups) != len(groups):
        raise ValueError(f"{path}: {len(groups)} row groups, but {len(recorded.groups)} are recorded; {_FIX}")
    starts = itertools.accumulate(counts, initial=0)
    return [RowGroup(path, i, start, count, num_bytes, recorded.groups[i] if recorded else "")
            for i, (start, count, num_bytes) in enumerate(zip(starts, counts, sizes)) if count]


def read_row_group(group: RowGroup) -> pyarrow.ChunkedArray:
    """The conversations of a row group. Raises: ValueError if it is damaged or not as recorded."""
    rows = f"{group.file}: rows {group.first_row} to {group.first_row + group.num_rows - 1}"
    # Opened anew each time: thousands of files would exhaust the file descriptors.
    with _open(group.file) as file:
        if group.sha256 and group_sha256(group.file, file.metadata, group.index) != group.sha256:
            raise ValueError(f"{rows} are damaged (not what was recorded); {_FIX}")
        try:
            column = file.read_row_group(group.index, columns=[COLUMN]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{rows} are damaged ({error}); restore the file or build it again") from error
    if len(column) != group.num_rows:
        raise ValueError(f"{rows} are damaged ({len(column)} of {group.num_rows} can be read); {_FIX}")
    return column


def row_text(column: pyarrow.ChunkedArray, group: RowGroup, offset: int) -> Row:
    """A row of a row group. Raises: ValueError if it is null or no Unicode."""
    place = f"{group.file} row {group.first_row + offset}"
    try:
        text = column[offset].as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the {COLUMN} is damaged (not UTF-8: {error.reason})") from error
    if text is None:
        raise ValueError(f"{place}: the {COLUMN} is null")
    return Row(text, place)


def _open(path: pathlib.Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
