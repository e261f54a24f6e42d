"""Safetensors files: read strictly, also in shards; written as one, as BAGEL's own code wants them.

The official library checks every header before anything else looks at a file; pickle is never read.
"""

import collections
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from irg_jax.checkpoints.listing import printable
from irg_jax.checkpoints.names import listing
from irg_jax.checkpoints.pages import let_go

BLOCK_BYTES = 2**22   # of a tensor: enough to read fast, and little enough for the processor's cache
TILE = 256            # columns that are transposed at once, for the same reason
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_READ = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_LONGEST_HEADER = 100_000_000   # bytes: the library's own limit
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


class Entry(NamedTuple):
    """One tensor of a file; `dtype` is the file's name for it ("F32"), `begin` its first byte's place."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    num_bytes: int


class TensorFiles:
    """The tensors of one safetensors file, or of the shards that an index names.

    Faults of the files are collected in `faults`, one sentence each; only sound files have entries.
    """

    def __init__(self, folder: pathlib.Path, stems: Sequence[str]):
        """Opens the first of `<stem>.safetensors`, `<stem>.safetensors.index.json` that exists."""
        self.files: list[pathlib.Path] = []
        self.entries: dict[str, Entry] = {}
        self.faults: list[str] = []
        self.digests: dict[str, str] = {}   # sha256 of each file that `tensors` has read
        choices = [folder / f"{stem}.safetensors{suffix}" for stem in stems
                   for suffix in ("", ".index.json")]
        path = next((file for file in choices if file.is_file()), None)
        self.name = choices[0].name if path is None else path.name
        if path is None:
            self.faults.append(_absence(folder, choices))
        elif path.suffix == ".json":
            self._open_shards(path)
        else:
            self._open(path)

    def tensors(self) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Every tensor of a readable dtype (F32, BF16, F16), file by file in the order of its bytes.

        A tensor comes as blocks of its rows, each of which is overwritten by the next. Every byte of every file
        is read once, and hashed on the way.
        """
        for file in self.files:
            entries = sorted((entry.begin, name) for name, entry in self.entries.items() if entry.file == file)
            with file.open("rb", buffering=0) as stream:
                hasher, place = hashlib.sha256(), 0
                for begin, name in entries:
                    _drain(_read(stream, hasher, begin - place))   # the header, and what nobody owns
                    entry = self.entries[name]
                    blocks = _read_rows(stream, hasher, entry)
                    if entry.dtype in _READ:
                        yield name, blocks
                    _drain(blocks)   # what the caller left
                    place = begin + entry.num_bytes
                while len(rest := stream.read(BLOCK_BYTES)):
                    hasher.update(rest)
            self.digests[file.name] = hasher.hexdigest()

    def _open(self, file: pathlib.Path) -> set[str]:
        self.files.append(file)
        try:
            with safe_open(file, framework="numpy") as handle:
                names = set(handle.keys())
        except (SafetensorError, OSError) as error:
            cut = _cut_tensors(file)
            self.faults.append(f"{file.name}: truncated: {listing(cut)}" if cut else
                               f"{file.name}: truncated or no safetensors file: {error}")
            return set()
        # The library has found the header sound; only now anything else looks at it.
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name in names:
            tensor = header[name]
            begin, end = tensor["data_offsets"]
            self.entries[name] = Entry(file, tuple(tensor["shape"]), tensor["dtype"], 8 + size + begin,
                                       end - begin)
        return names

    def _open_shards(self, index: pathlib.Path) -> None:
        self.files.append(index)
        try:
            placed = read_index(index)
        except ValueError as error:
            self.faults.append(str(error))
            return
        for shard in sorted(set(placed.values())):
            if not (index.parent / shard).is_file():
                self.faults.append(f"{index.name}: names {shard}, which does not exist")
                continue
            found = self._open(index.parent / shard)
            expected = {name for name, file in placed.items() if file == shard}
            if found and found != expected:
                self.faults.append(f"{index.name}: disagrees with {shard} about "
                                   f"{listing(sorted(found ^ expected))}")


def read_index(index: pathlib.Path) -> dict[str, str]:
    """{tensor: shard} of a `*.index.json`. Raises ValueError, also for a shard elsewhere."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index.name}: no JSON object with a weight_map: {error!r}") from error
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index.name}: weight_map must map tensor names to files")
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(f"{index.name}: places {printable(name)} in {shard!r}; a shard is a .safetensors "
                             "file beside the index, named without a folder")
    return placed


class Pending(NamedTuple):
    """A tensor still to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: pathlib.Path, stem: str, tensors: Sequence[Pending],
                  make: Callable[[list[tuple[str, np.dtype]]], Iterator[np.ndarray]]) -> None:
    """Writes `<stem>.safetensors`, tensor by tensor: the library's writer would hold all, and a copy.

    Args: make gives tensors by name and dtype, one by one, contiguous or not; it is asked once, for all of
        them in the order in which they are written.
    """
    # Large items first, as the library has it, so that each is aligned.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    made = make([(tensor.name, tensor.dtype) for tensor in tensors])
    # torch's loaders ask for this metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype.name], "shape": tensor.shape,
                               "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = folder / f"{stem}.safetensors"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            _write_tensor(stream, file, next(made))   # which alone holds it


def _write_tensor(stream: Any, file: pathlib.Path, tensor: np.ndarray) -> None:
    for number, block in enumerate(blocks(tensor), start=1):
        stream.write(block.reshape(-1).view(np.uint8).data)
        if number % 16 == 0:
            let_go(file)


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array as contiguous blocks of its rows, of about BLOCK_BYTES: views, or one buffer filled anew."""
    if array.ndim < 2:
        array = np.ascontiguousarray(array)
    rows = max(BLOCK_BYTES * len(array) // max(array.nbytes, 1), 1)
    buffer = None if array.flags.c_contiguous else np.empty((rows, *array.shape[1:]), array.dtype)
    for first in range(0, len(array), rows):
        part = array[first:first + rows]
        if buffer is None:
            yield part
            continue
        block = buffer[:len(part)]
        for column in range(0, array.shape[1], TILE):
            block[:, column:column + TILE] = part[:, column:column + TILE]
        yield block


def _read_rows(stream: Any, hasher: Any, entry: Entry) -> Iterator[np.ndarray]:
    """The next bytes as blocks [rows, *shape[1:]] of a tensor; uint8 [bytes] if its dtype is unreadable."""
    if entry.dtype not in _READ:
        yield from _read(stream, hasher, entry.num_bytes)
        return
    dtype = np.dtype(_READ[entry.dtype])
    row = math.prod(entry.shape[1:]) * dtype.itemsize
    for piece in _read(stream, hasher, entry.num_bytes, max(BLOCK_BYTES // max(row, 1), 1) * row):
        yield piece.view(dtype).reshape(-1, *entry.shape[1:])


def _read(stream: Any, hasher: Any, count: int, size: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
    """The next `count` bytes, hashed: uint8 [size] at most, in a buffer that they share."""
    buffer = np.empty(min(size, count), np.uint8)
    while count:
        piece, held = buffer[:count], 0
        while held < len(piece):   # the system reads at most 2 GiB at once
            got = stream.readinto(memoryview(piece)[held:])
            if not got:
                raise ValueError(f"{stream.name}: the file became shorter while it was read")
            held += got
        hasher.update(piece)
        count -= len(piece)
        yield piece


def _drain(iterator: Iterator[np.ndarray]) -> None:
    collections.deque(iterator, maxlen=0)


def _absence(folder: pathlib.Path, choices: list[pathlib.Path]) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    hint = (f"; {listing(pickles)} may be pickle, which runs code when it is read, and is refused: "
            "convert it to safetensors" if pickles else "")
    return f"{choices[0].name}: missing (none of {listing(f.name for f in choices)} exists){hint}"


def _cut_tensors(file: pathlib.Path) -> list[str]:
    """Tensors whose bytes lie beyond the end of the file, if its header is whole."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            held = file.stat().st_size - 8 - size
            header = json.loads(stream.read(size)) if held >= 0 and size <= _LONGEST_HEADER else {}
        return [name for name, tensor in header.items()
                if name != "__metadata__" and tensor["data_offsets"][1] > held]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return []   # the header is broken too: the library's own message stands
