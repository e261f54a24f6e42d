"""Precomputed posterior moments of the frozen VAE, so that training skips the encoder.

    DIR/<group>/00000.array_record ...   one entry a record: the moments of its VAE images in order
    DIR/moments.json                     what they were computed from, and how many records each file has

`irg_jax.moments` writes them with the model; this module knows the format alone. An entry is the
image table int32 [n, 2] (height, width in latent tokens) after its length n, then the values.
ArrayRecord checks every block against its checksum, so a flipped bit is an error and not a latent.
"""

import bisect
import dataclasses
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.digests import write_json
from data_pipelines.records import ImagePart, Record

MANIFEST = "moments.json"


class Layout(NamedTuple):
    """Values of a latent token (means, then log variances) and their type."""

    values: int
    dtype: str


def vae_parts(record: Record) -> list[ImagePart]:
    """The image parts that enter the VAE, noised or clean, in order."""
    return [part for part in record.parts if isinstance(part, ImagePart) and (part.need_loss or part.need_vae)]


def describe(config: DataConfig, group: GroupConfig, *, digest: str) -> dict[str, Any]:
    """What the moments of a group depend on, the encoder aside; `digest` is the source's."""
    return {"data": digest, "vae_transform": dataclasses.asdict(group.vae_transform or config.vae_transform),
            "latent_patch": config.latent_patch}


def encode_entry(images: Sequence[np.ndarray]) -> bytes:
    """Moments of a record's images, each [h, w, 2 * Z] of one dtype, as bytes."""
    table = np.array([image.shape[:2] for image in images], "<i4").reshape(-1, 2)
    return b"".join([np.array(len(images), "<i4").tobytes(), table.tobytes(),
                     *(np.ascontiguousarray(image).tobytes() for image in images)])


def decode_entry(data: bytes, layout: Layout, *, where: str) -> list[np.ndarray]:
    """The inverse of `encode_entry`. Raises: ValueError naming `where` if the lengths do not agree."""
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    count = int(np.frombuffer(data[:4], "<i4")[0]) if len(data) >= 4 else -1
    header = 4 + 8 * count
    if count < 0 or len(data) < header:
        raise ValueError(f"{where}: the entry of {len(data)} bytes is not one of moments")
    table = np.frombuffer(data[4:header], "<i4").reshape(count, 2)
    sizes = [int(height) * int(width) * layout.values for height, width in table]
    if (table <= 0).any() or len(data) != header + sum(sizes) * dtype.itemsize:
        raise ValueError(f"{where}: the entry's {len(data)} bytes are not images of {table.tolist()} tokens")
    values = np.split(np.frombuffer(data[header:], dtype), np.cumsum(sizes)[:-1]) if count else []
    return [image.reshape(height, width, layout.values) for image, (height, width) in zip(values, table)]


class Moments:
    """The moments of one group: `moments.of(index, record)`. Safe for many threads."""

    def __init__(self, folder: str | pathlib.Path, group: GroupConfig, *, wanted: Mapping[str, Any]):
        """Args: wanted is `describe` of the data at hand.

        Raises: ValueError if the folder lacks the group, or was computed from something else.
        """
        self._folder = pathlib.Path(folder, group.name)
        manifest = read_manifest(folder)
        written = manifest["groups"].get(group.name)
        if written is None:
            raise ValueError(f"{folder} has no moments of group {group.name!r}; it has "
                             f"{sorted(manifest['groups'])}. Run python -m irg_jax.moments again")
        differing = [key for key, value in wanted.items() if written.get(key) != value]
        if differing:
            raise ValueError(f"{self._folder} was computed from something else: {', '.join(differing)} differ; "
                             "run python -m irg_jax.moments again")
        self.layout, self.vae = Layout(**manifest["layout"]), manifest["vae"]
        self._files = [self._folder / name for name in written["files"]]
        self._ends = list(itertools.accumulate(written["files"].values()))
        self._readers = threading.local()

    def __len__(self) -> int:
        return self._ends[-1]

    def of(self, index: int, record: Record) -> dict[str, np.ndarray]:
        """Moments of the record's VAE images by the place of their part, each [h, w, 2 * Z]."""
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        where = f"{self._files[number]} record {row}"
        try:
            data = self._reader(number).read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: the moments are damaged ({error}); compute them again") from error
        images, parts = decode_entry(data, self.layout, where=where), vae_parts(record)
        if len(images) != len(parts):
            raise ValueError(f"{where} holds {len(images)} images, but {record.place} has {len(parts)}")
        return {part.place: image for part, image in zip(parts, images)}

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        # A reader is for one thread; it keeps its file open, so a thread keeps the last one alone.
        known = getattr(self._readers, "last", None)
        if known is None or known[0] != number:
            known = number, array_record_module.ArrayRecordReader(str(self._files[number]))
            self._readers.last = known
        return known[1]


def write_shard(path: pathlib.Path, entries: Iterable[Sequence[np.ndarray] | None], layout: Layout) -> int:
    """Writes the entries of consecutive records, None as an empty one, and returns how many were None.

    The file is whole or absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    bad = 0
    for images in entries:
        bad += images is None
        writer.write(encode_entry([image.astype(layout.dtype) for image in images or ()]))
    writer.close()
    temporary.replace(path)
    return bad


def write_manifest(folder: pathlib.Path, inputs: Mapping[str, Any], *, shard: int,
                   counts: Mapping[str, int]) -> None:
    """Completes a folder whose groups have files of `shard` records. Raises: ValueError if one is missing."""
    groups = {}
    for name, count in counts.items():
        sizes = {f"{number:05d}.array_record": min(shard, count - start)
                 for number, start in enumerate(range(0, count, shard))}
        missing = [file for file in sizes if not (folder / name / file).exists()]
        if missing:
            raise ValueError(f"{folder / name} lacks {', '.join(missing)}; run python -m irg_jax.moments again")
        groups[name] = inputs["groups"][name] | {"files": sizes}
    write_json(folder / MANIFEST, dict(inputs) | {"groups": groups})


def read_manifest(folder: str | pathlib.Path) -> dict[str, Any]:
    """`moments.json`. Raises: ValueError if it is missing or no manifest of moments."""
    path = pathlib.Path(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        Layout(**manifest["layout"]), manifest["vae"], manifest["groups"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of moments ({error!r}); run "
                         "python -m irg_jax.moments") from error
    return manifest
