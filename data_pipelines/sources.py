"""Random access to the rows of parquet files: `<source>/<split>/<group>/*.parquet`, whatever their columns.

Rows are read by row group, a few of which stay in memory. Every page is checked against its
checksum, and every row group against the digest that is recorded of it, see `digests`: with neither,
most flipped bytes in a parquet file are silently wrong text.
"""

import bisect
import itertools
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data_pipelines.digests import FileDigest, footer_sha256, group_sha256, read_recorded

COLUMN = "conversation"
# The columns of each kind of records that is stored in parquet, and their types.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "conversation": {COLUMN: "string"},
    "text_to_image": {"image": "binary", "captions": "string"},
    "editing": {"image_list": "list<binary>", "instruction_list": "list<list<string>>"},
}
_FIX = "restore the file; if it was changed on purpose, run python -m data_pipelines.check --write"


class Row(NamedTuple):
    """The values of one row, in the order of the columns that were asked for, and its file and row."""

    values: tuple[Any, ...]
    place: str

    @property
    def text(self) -> str:
        """The first value: of a row of conversations, all there is."""
        return self.values[0]


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

    def __init__(self, folder: str | pathlib.Path, columns: Mapping[str, str] = COLUMNS["conversation"], *,
                 cache_mib: int = 256, digests: str | pathlib.Path = ""):
        """Opens the files and compares them with what is recorded of them, row groups excepted.

        Args:
            folder: with parquet files, at any depth.
            columns: the names that are read and their types, such as "string" or "list<binary>".
            cache_mib: bounds the row groups kept in memory.
            digests: file of `check --write --digests`, if the data set's folder does not hold it.
        Raises: ValueError naming the file that is empty, broken, not as recorded, or has other columns.
        """
        self.folder, self._columns = pathlib.Path(folder), columns
        # Other tools give such names to folders.
        self.files = sorted(file for file in self.folder.rglob("*.parquet") if file.is_file())
        if not self.files:
            raise ValueError(f"no parquet file in {str(self.folder)!r}; build the data set first "
                             "(python -m data_pipelines.build) or correct source, split and groups")
        recorded = read_recorded(self.folder, self.files, digests=digests)
        self.digest = recorded.content
        self._groups = [group for file in self.files for group in list_row_groups(
            file, columns, recorded.files.get(file.relative_to(self.folder).as_posix()))]
        self._ends = list(itertools.accumulate(group.num_rows for group in self._groups))
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._cache_bytes = cache_mib * 2**20
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """Raises: ValueError naming file and rows that are damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        group = self._groups[number]
        offset = index - (self._ends[number] - group.num_rows)
        try:
            table = self._read(number)
        except ValueError as error:  # of many rows; each is a record that is lost, and counts
            raise ValueError(f"{_place(group, offset)} cannot be read: {error}") from error
        return read_row(table, group, offset)

    def _read(self, number: int) -> pyarrow.Table:
        with self._lock:
            if number not in self._cache:
                self._cache[number] = read_row_group(self._groups[number], self._columns)
                while (len(self._cache) > 1 and
                       sum(table.nbytes for table in self._cache.values()) > self._cache_bytes):
                    self._cache.popitem(last=False)
            self._cache.move_to_end(number)
            return self._cache[number]


def list_row_groups(path: pathlib.Path, columns: Mapping[str, str],
                    recorded: FileDigest | None = None) -> list[RowGroup]:
    """The row groups of a file that have rows.

    Raises: ValueError if the file is broken, empty, not as recorded, or has other columns.
    """
    if recorded and footer_sha256(path) != recorded.footer:
        raise ValueError(f"{path}: the footer is not the one that was recorded; {_FIX}")
    with open_parquet(path) as file:
        schema = file.schema_arrow
        for name, wanted in columns.items():
            index = schema.get_field_index(name)  # -1 also if two have the name
            if index < 0:
                raise ValueError(f"{path}: no column {name!r}; it has {schema.names}")
            if (found := _type_name(schema.field(index).type)) != wanted:
                raise ValueError(f"{path}: column {name!r} holds {found}; expected {wanted}")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        counts, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
    if min(counts, default=0) < 0:
        raise ValueError(f"{path}: the footer is damaged (a row group of {min(counts)} rows)")
    if sum(counts) == 0:
        raise ValueError(f"{path}: the parquet file has no rows")
    if recorded and len(recorded.groups) != len(counts):
        raise ValueError(f"{path}: {len(counts)} row groups, but {len(recorded.groups)} are recorded; {_FIX}")
    starts = itertools.accumulate(counts, initial=0)
    return [RowGroup(path, i, start, count, num_bytes, recorded.groups[i] if recorded else "")
            for i, (start, count, num_bytes) in enumerate(zip(starts, counts, sizes)) if count]


def read_row_group(group: RowGroup, columns: Mapping[str, str]) -> pyarrow.Table:
    """A row group's columns, in this order. Raises: ValueError if it is damaged or not as recorded."""
    rows = f"{group.file}: rows {group.first_row} to {group.first_row + group.num_rows - 1}"
    # Opened anew each time: thousands of files would exhaust the file descriptors.
    with open_parquet(group.file) as file:
        try:
            if group.sha256 and group_sha256(group.file, file.metadata, group.index) != group.sha256:
                raise ValueError(f"{rows} are damaged (not what was recorded); {_FIX}")
            table = file.read_row_group(group.index, columns=list(columns)).select(list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{rows} are damaged ({error}); restore the file or build it again") from error
    if len(table) != group.num_rows:
        raise ValueError(f"{rows} are damaged ({len(table)} of {group.num_rows} can be read); {_FIX}")
    return table


def read_row(table: pyarrow.Table, group: RowGroup, offset: int) -> Row:
    """A row of a row group. Raises: ValueError if a text of it is no Unicode."""
    place = _place(group, offset)
    try:
        return Row(tuple(column[offset].as_py() for column in table.columns), place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the text is damaged (not UTF-8: {error.reason})") from error


def _place(group: RowGroup, offset: int) -> str:
    return f"{group.file} row {group.first_row + offset}"


def open_parquet(path: pathlib.Path) -> pyarrow.parquet.ParquetFile:
    """Reads the footer; pages will be checked. Raises: ValueError naming the file if it is broken."""
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        "".join(file.schema_arrow.names)  # names that are no Unicode raise when they are asked for
        return file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def _type_name(type: pyarrow.DataType) -> str:
    """As in `columns`: one name for types that hold the same values."""
    if pyarrow.types.is_list(type) or pyarrow.types.is_large_list(type):
        return f"list<{_type_name(type.value_type)}>"
    return str(type).removeprefix("large_")
