"""What a training checkpoint holds, from Orbax's metadata: no array is read.

Whether the files are what was written, only their digests say (`seals`).
"""

import contextlib
import json
import math
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from orbax.checkpoint import v1 as ocp

from irg_jax.checkpoints.listing import measure
from irg_jax.checkpoints.names import flatten

TREES = ("state", "ema")
_POSITION = "position"
_LONGEST, _MOST = 100, 8   # characters of a string, and values of a list, that are shown


class Leaf(NamedTuple):
    """An array of a tree, by its dotted path."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Contents(NamedTuple):
    """Of one step."""

    sizes: dict[str, int]           # bytes of each item's files
    trees: dict[str, list[Leaf]]    # of the items in TREES
    position: str                   # JSON, indented, long values shortened


def read_contents(step: pathlib.Path) -> Contents:
    """Raises: ValueError if the files of a step are not what Orbax writes, or an item is missing."""
    items = sorted(path.name for path in step.iterdir() if path.is_dir())
    if missing := [item for item in (*TREES, _POSITION) if item not in items]:
        raise ValueError(f"{str(step)!r} lacks {' and '.join(missing)}; it is not whole")
    with _damage(step):
        trees = {item: _read_leaves(step, item) for item in TREES}
        position = ocp.load_checkpointables(step, {_POSITION: None})[_POSITION]
        return Contents({item: measure(step / item) for item in items}, trees,
                        json.dumps(_shorten(position), indent=1, default=str))


def _read_leaves(step: pathlib.Path, item: str) -> list[Leaf]:
    metadata = ocp.metadata(step, item).metadata
    if metadata is None:   # Orbax only warns
        raise ValueError(f"Orbax cannot read the structure of its {item}")
    return [Leaf(path, tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flatten(metadata).items()]


def group(leaves: list[Leaf]) -> dict[str, list[Leaf]]:
    """Leaves by the first word of their paths."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.path.partition(".")[0], []).append(leaf)
    return groups


def _shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorten(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        more = [f"... {len(value) - _MOST} more"] if len(value) > _MOST else []
        return [_shorten(each) for each in value[:_MOST]] + more
    return f"{value[:_LONGEST - 3]}..." if isinstance(value, str) and len(value) > _LONGEST else value


@contextlib.contextmanager
def _damage(step: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:   # Orbax and TensorStore raise a dozen unrelated types over files not theirs
        first = error
        while first.__cause__:
            first = first.__cause__
        cause = textwrap.shorten(str(first) or type(first).__name__, 300)
        raise ValueError(f"{str(step)!r} is damaged or no checkpoint: {cause}") from error
