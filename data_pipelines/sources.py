"""Random access to the rows of parquet files: `<source>/<split>/<group>/*.parquet`.

Rows are read by row group, a few of which stay in memory, and every page is checked against its
checksum: without that, most flipped bytes in a parquet file are silently wrong text.
"""

import bisect
import itertools
import pathlib
import threading
from collections import OrderedDict
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

COLUMN = "conversation"


class Row(NamedTuple):
    """The text of one conversation and the file and row it stands in."""

    text: str
    place: str


class _RowGroup(NamedTuple):
    file: pathlib.Path
    index: int      # within its file
    first_row: int  # within its file
    num_rows: int


class ParquetRows:
    """All rows of one group: `len(source)` rows, `source[i]` is a `Row`. Safe for many threads."""

    def __init__(self, folder: str | pathlib.Path, *, cache_mib: int = 256):
        """Args: folder with parquet files; cache_mib bounds the row groups kept in memory.

        Raises: ValueError naming the file that is empty, broken or has no `conversation` column.
        """
        self.folder = pathlib.Path(folder)
        self.files = sorted(self.folder.rglob("*.parquet"))
        if not self.files:
            raise ValueError(f"no parquet file in {str(self.folder)!r}; build the data set first "
                             "(python -m data_pipelines.build) or correct source, split and groups")
        self._groups = [group for file in self.files for group in _row_groups(file)]
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
        place = f"{group.file} row {group.first_row + offset}"
        text = self._read(number)[offset].as_py()
        if text is None:
            raise ValueError(f"{place}: the {COLUMN} is null")
        return Row(text, place)

    def _read(self, number: int) -> pyarrow.ChunkedArray:
        with self._lock:
            if number not in self._cache:
                group = self._groups[number]
                # Opened anew each time: thousands of files would exhaust the file descriptors.
                with _open(group.file) as file:
                    self._cache[number] = _column(file, group)
                while (len(self._cache) > 1 and
                       sum(column.nbytes for column in self._cache.values()) > self._cache_bytes):
                    self._cache.popitem(last=False)
            self._cache.move_to_end(number)
            return self._cache[number]


def _row_groups(path: pathlib.Path) -> list[_RowGroup]:
    with _open(path) as file:
        field = file.schema_arrow.field(COLUMN) if COLUMN in file.schema_arrow.names else None
        if field is None:
            raise ValueError(f"{path}: no column {COLUMN!r}; it has {file.schema_arrow.names}")
        if not (pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)):
            raise ValueError(f"{path}: column {COLUMN!r} holds {field.type}; expected JSON strings")
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if sum(counts) == 0:
        raise ValueError(f"{path}: the parquet file has no rows")
    starts = itertools.accumulate(counts, initial=0)
    return [_RowGroup(path, i, start, count)
            for i, (start, count) in enumerate(zip(starts, counts)) if count]


def _open(path: pathlib.Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def _column(file: pyarrow.parquet.ParquetFile, group: _RowGroup) -> pyarrow.ChunkedArray:
    try:
        return file.read_row_group(group.index, columns=[COLUMN]).column(0)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{group.file}: rows {group.first_row} to "
                         f"{group.first_row + group.num_rows - 1} are damaged ({error}); restore "
                         "the file or build it again") from error
