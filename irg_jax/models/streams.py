"""Three arrays that travel together: one an expert's input, all three one attention's."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from data_pipelines.batch import Rows


class Streams(NamedTuple):
    """Anything held per stream: [B, T, ...], [B, V, ...], [B, G, ...]. A stream may be empty."""

    text: Any
    vit: Any
    latent: Any


def join(streams: Sequence[Array]) -> Array:
    """[B, S, ...] each -> [B, sum of S, ...]: only attention looks at the streams as one sequence."""
    return jnp.concatenate(streams, axis=1)


def split(joined: Array, like: Sequence[Array]) -> tuple[Array, ...]:
    """The inverse of `join`, with the lengths of `like`."""
    ends = itertools.accumulate(part.shape[1] for part in like)
    return tuple(joined[:, end - part.shape[1]:end] for part, end in zip(like, ends))


def shares(streams: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """Streams of [B, count * S, ...] each, or of `Rows` -> `count` times the streams, [B, S, ...] each."""
    if count == 1:
        return [tuple(streams)]
    part = lambda x, i: x[:, i * (x.shape[1] // count):(i + 1) * (x.shape[1] // count)]
    return [tuple(jax.tree.map(lambda x: part(x, i), stream) for stream in streams) for i in range(count)]


def join_rows(rows: Sequence[Rows]) -> Rows:
    """`Rows` of [B, S] each -> `Rows` of [B, sum of S]."""
    return Rows(*map(join, zip(*rows)))
