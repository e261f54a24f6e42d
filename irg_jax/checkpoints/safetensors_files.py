"""Safetensors files of a folder, read strictly; the official library checks every header first."""

import dataclasses
import json
import pathlib
import re

import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file; `dtype` is the file's name for it ("F32")."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of one safetensors file, or of the shards that an index names.

    Faults of the files are collected in `faults`, one sentence each; only sound files have entries.
    """

    def __init__(self, folder: pathlib.Path, stems: tuple[str, ...]):
        """Opens the first of `<stem>.safetensors`, `<stem>.safetensors.index.json` that exists."""
        self.faults: list[str] = []
        self.entries: dict[str, Entry] = {}
        self._handles = {}
        files = [folder / f"{stem}.safetensors{suffix}" for stem in stems for suffix in ("", ".index.json")]
        self.path = next((file for file in files if file.is_file()), None)
        if self.path is None:
            self.faults.append(_absent(folder, files))
        elif self.path.suffix == ".json":
            self._open_shards(self.path)
        else:
            self._open(self.path)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in host memory."""
        return self._handles[self.entries[name].file].get_tensor(name)

    def _open(self, file: pathlib.Path) -> list[str]:
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            cut = _cut_tensors(file)
            self.faults.append(f"{file.name} is truncated; tensors that are cut off: {listing(cut)}" if cut
                               else f"{file.name} is not a sound safetensors file ({error})")
            return []
        self._handles[file] = handle
        names = list(handle.keys())
        for name in names:
            part = handle.get_slice(name)
            self.entries[name] = Entry(file, tuple(part.get_shape()), str(part.get_dtype()))
        return names

    def _open_shards(self, index: pathlib.Path) -> None:
        try:
            shard_of = read_index(index)
        except ValueError as error:
            self.faults.append(str(error))
            return
        for shard in sorted(set(shard_of.values())):
            expected = {name for name, file in shard_of.items() if file == shard}
            if not (index.parent / shard).is_file():
                self.faults.append(f"{index.name} names {shard}, which does not exist")
                continue
            found = set(self._open(index.parent / shard))
            if found and found != expected:
                self.faults.append(f"{index.name} and {shard} differ in {listing(found ^ expected)}")


def read_index(index: pathlib.Path) -> dict[str, str]:
    """{tensor: shard file} of a `*.index.json`. Raises ValueError if a shard could leave the folder."""
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index with a weight_map ({error!r})") from error
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index.name}: weight_map must map tensor names to files")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(f"{index.name} places {name} in {shard!r}; a shard is a .safetensors file "
                             "beside the index, named without any folder")
    return shard_of


def listing(names, limit: int = 20) -> str:
    """The first names in order, and how many there are beyond."""
    names = sorted(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _absent(folder: pathlib.Path, files: list[pathlib.Path]) -> str:
    pickles = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
    refused = (f"; {listing(pickles)} may be pickle, which runs code when read: convert to safetensors"
               if pickles else "")
    return f"none of {', '.join(file.name for file in files)} exists{refused}"


def _cut_tensors(file: pathlib.Path) -> list[str]:
    """Tensors whose bytes lie beyond the end of the file, if its header is whole."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            held = file.stat().st_size - 8 - size
            if held < 0:
                return []
            header = json.loads(stream.read(size))
        return [name for name, entry in header.items()
                if name != "__metadata__" and entry["data_offsets"][1] > held]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return []   # the header itself is broken: the library's own message stands
