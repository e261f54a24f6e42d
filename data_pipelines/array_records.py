"""Random access to records in a TFDS data set of ArrayRecord files, as `tfds_builder` describes it.

ArrayRecord checks what it reads against checksums of its own, so a flipped bit is an error. At the
start only the manifest, names and sizes of the files are read, and of each file its index.
"""

import bisect
import functools
import itertools
import json
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_pipelines.digests import read_recorded
from data_pipelines.layout import INFO, SPLIT, TYPES
from data_pipelines.records import ImagePart, Limits, Record, TextPart, check_targets, image_part, text_part
from data_pipelines.staging import PARTIAL, fetch, find_origin
from data_pipelines.stored_costs import load_costs

_OPEN_FILES = 32  # ArrayRecord readers kept open
# The index of a file stays in memory; reading ahead would be in vain.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:1"


class ArrayRecordSource:
    """The records of one group: `source[i] -> Record`. Safe for many threads."""

    def __init__(self, folder: str | pathlib.Path, *, mode: str, limits: Limits = Limits()):
        """Args: folder with dataset_info.json.

        Raises: ValueError naming what is missing, not as the manifest says, or of another form.
        """
        self.folder, self._mode, self._limits = pathlib.Path(folder), mode, limits
        self._staged = find_origin(self.folder.absolute())
        present = sorted(path for path in self.folder.iterdir()
                         if path.is_file() and not path.name.endswith(PARTIAL))    # another process may copy
        self.digest = read_recorded(self.folder, present, suffix="", may_lack=self._staged is not None).content
        self.files, lengths = list_shards(self.folder, may_lack=self._staged is not None)
        self._ends = list(itertools.accumulate(lengths))
        self._readers: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        number = self._find(index)
        row = index - (self._ends[number - 1] if number else 0)
        place = f"{self.files[number]} record {row}"
        try:
            reader = self._reader(number)
        except ValueError as error:  # of many records; each is lost, and counts
            raise ValueError(f"{place} cannot be read: {error}") from error
        return read_record(reader, row, mode=self._mode, limits=self._limits, place=place)

    def fetch(self, indices: Iterable[int]) -> None:
        """Brings the files of these records to this host, if the data set was staged without them."""
        if self._staged:
            fetch(self._staged, {self.files[self._find(index)].absolute() for index in indices})

    def _find(self, index: int) -> int:
        """The number of the file that has a record."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect.bisect_right(self._ends, index)

    def stored_costs(self, key: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """int32 [M, 5] and int64 [R + 1], the rows of `CostTable`; None if they were measured otherwise.

        Args: key is `describe_costs` of the configuration at hand.
        Raises: ValueError if the file is damaged.
        """
        return load_costs(self.folder, key, length=len(self))

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        # Threads share a reader: it keeps no position. One that is dropped closes when its last read ends.
        with self._lock:
            if number not in self._readers:
                first = self._ends[number - 1] if number else 0
                self.fetch([first])
                self._readers[number] = open_shard(self.files[number], length=self._ends[number] - first)
                if len(self._readers) > _OPEN_FILES:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return self._readers[number]


# What a damaged shard raises: Riegeli, a proto that does not parse, and TFDS when a field is wrong or absent.
_READ_ERRORS = (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError)


def list_shards(folder: pathlib.Path, *, may_lack: bool = False) -> tuple[list[pathlib.Path], list[int]]:
    """Files of a data set in order, and how many records each has.

    Args: may_lack: files may be absent.
    Raises: ValueError if the folder holds no data set of ours.
    """
    import tensorflow_datasets as tfds  # half a second that only its data sets should cost
    try:
        with open(folder / INFO, encoding="utf-8") as file:
            json.load(file)  # TFDS reads a broken one with an error that names no file
        info = tfds.builder_from_directory(folder).info
        split = info.splits[SPLIT]
        files, lengths = [pathlib.Path(path) for path in split.filepaths], list(split.shard_lengths)
    except Exception as error:  # TFDS and its protos raise a dozen unrelated types here
        raise ValueError(f"{folder / INFO} describes no data set that can be read ({_first_line(error)}); "
                         "restore it, or build the data set again") from error
    if info.features.get_serialized_info() != _features().get_serialized_info():
        raise ValueError(f"{folder} is a TFDS data set with other features than `data_pipelines.build` writes")
    missing = [] if may_lack else [path.name for path in files if not path.is_file()]
    if missing or not sum(lengths):
        raise ValueError(f"{folder} lacks {', '.join(missing) or 'records'}; restore it, or build it again")
    return files, lengths


def open_shard(path: pathlib.Path, *, length: int) -> array_record_module.ArrayRecordReader:
    """A reader for single records. Raises: ValueError if it is damaged, or has not `length` records."""
    fix = "restore the file, or build it again"
    try:
        reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
        found = reader.num_records()
    except _READ_ERRORS as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {fix}") from error
    if found != length:
        raise ValueError(f"{path} is damaged ({found} records, {INFO} says {length}); {fix}")
    return reader


def read_record(reader: array_record_module.ArrayRecordReader, row: int, *, mode: str, place: str,
                limits: Limits = Limits()) -> Record:
    """One record of a shard. Raises: ValueError naming `place`, and the part if it is one that is wrong."""
    try:
        columns = _features().deserialize_example_np(reader.read([row])[0])["parts"]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
    except _READ_ERRORS as error:
        raise ValueError(f"{place} is damaged ({_first_line(error)}); restore the file, or build it "
                         "again") from error
    parts = [_parse_part(row, f"{place}, part {i}", limits) for i, row in enumerate(rows)]
    check_targets(parts, place=place)
    return Record(tuple(parts), mode, place)


def _parse_part(row: Mapping[str, Any], place: str, limits: Limits) -> TextPart | ImagePart:
    flags = {name: bool(row[name]) for name in ("need_loss", "need_vae", "need_vit")}
    if row["type"] not in range(len(TYPES)):
        raise ValueError(f"{place}: unknown part type {row['type']}")
    if TYPES[row["type"]] == "image":
        return image_part(row["content"], place=place, limits=limits, **flags)
    try:
        text = row["content"].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the text is not Unicode ({error.reason})") from error
    return text_part(text, need_loss=flags["need_loss"], place=place, limits=limits)


@functools.cache
def _features() -> Any:
    from data_pipelines.tfds_builder import features
    return features()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
