"""The pack index: a plan on disk, block after block, each with its checksum.

    magic 8 bytes | number u32 | rows u32 | states u32 | crc32 u32     header, little-endian
    rows int32 [rows, 3] | ends int32 [PACKS] | costs int32 [PACKS, 4] | state int64 [states]

Blocks follow one another by number from 0 on. A plan can be made again from nothing, so a block that is
torn (the writer was killed) or damaged costs time, never data: it and all behind it are planned again,
from the state that the block before it ends with, and written over.
"""

import contextlib
import logging
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PACKS = 64            # of a block
_MAGIC = b"IRGPLAN3"  # changes with the layout and with the planner: an old index is planned again
_HEADER = struct.Struct("<8s4I")
_FIELDS = (("<i4", 3), ("<i4", 1), ("<i4", 4), ("<i8", 1))


class Block(NamedTuple):
    """The plan of PACKS packs."""

    rows: np.ndarray   # int32 [n, 3]: group, epoch and index of each record, pack after pack
    ends: np.ndarray   # int32 [PACKS]: the end of each pack in `rows`
    costs: np.ndarray  # int32 [PACKS, 4]
    state: np.ndarray  # int64 [s]: the planner's, behind the block


class PlanIndex:
    """A file of blocks; `blocks` are those that are whole."""

    def __init__(self, path: pathlib.Path):
        """Reads what is there. Nothing is written before `append`. Raises: ValueError if it cannot be read."""
        self._path = path
        with told(path, "the pack index cannot be read"):
            data = path.read_bytes() if path.exists() else b""
        self.blocks = list(_parse(data))
        self._size = sum(len(_serialise(number, block)) for number, block in enumerate(self.blocks))
        if self._size < len(data):
            logging.warning("%s: block %d of the pack index is damaged; planning it again", path,
                            len(self.blocks))

    def append(self, block: Block) -> None:
        """Writes the next block, over whatever damage is there.

        Two writers of one plan do no harm: they write the same bytes to the same place.

        Raises: ValueError if it cannot be written.
        """
        data = _serialise(len(self.blocks), block)
        with told(self._path, "the pack index cannot be written"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            with open(self._path, "r+b") as file:
                file.seek(self._size)
                file.write(data)
        self._size += len(data)
        self.blocks.append(block)


@contextlib.contextmanager
def told(path: pathlib.Path, fault: str) -> Iterator[None]:
    """What the system refuses in `index_dir` as one sentence. Raises: ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {fault} ({error.strerror}); make room or give access, or set "
                         "data.index_dir to another folder") from error


def _serialise(number: int, block: Block) -> bytes:
    payload = b"".join(array.astype(kind).tobytes() for array, (kind, _) in zip(block, _FIELDS, strict=True))
    head = struct.pack("<3I", number, len(block.rows), len(block.state))
    return _MAGIC + head + struct.pack("<I", zlib.crc32(head + payload)) + payload


def _parse(data: bytes) -> Iterator[Block]:
    """The blocks up to the first that is not whole."""
    start, expected = 0, 0
    while start + _HEADER.size <= len(data):
        magic, number, rows, states, checksum = _HEADER.unpack_from(data, start)
        counts = (rows, PACKS, PACKS, states)
        end = start + _HEADER.size + sum(count * width * np.dtype(kind).itemsize
                                         for count, (kind, width) in zip(counts, _FIELDS))
        covered = data[start + len(_MAGIC):start + _HEADER.size - 4] + data[start + _HEADER.size:end]
        if magic != _MAGIC or number != expected or end > len(data) or zlib.crc32(covered) != checksum:
            return
        arrays, offset = [], start + _HEADER.size
        for count, (kind, width) in zip(counts, _FIELDS):
            array = np.frombuffer(data, kind, count * width, offset)
            offset += array.nbytes
            arrays.append(array.reshape(count, width) if width > 1 else array)
        yield Block(*arrays)
        start, expected = end, expected + 1
