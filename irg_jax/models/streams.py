"""Three arrays that travel together: one an expert's input, all three one attention's."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from data_pipelines.batch import Rows


class Streams(NamedTuple):
    """Anything held per stream: [B, T, ...], [B, V, ...], [B, G, ...]. A stream may be empty."""

    text: Any
    vit: Any
    latent: Any


def join(streams: Streams) -> Any:
    """[B, T + V + G, ...]: only attention looks at the streams as one sequence."""
    return jnp.concatenate(streams, axis=1)


def split(joined: Any, like: Streams) -> Streams:
    """The inverse of `join`, with the lengths of `like`."""
    text, vit = like.text.shape[1], like.vit.shape[1]
    return Streams(joined[:, :text], joined[:, text:text + vit], joined[:, text + vit:])


def join_rows(rows: Streams) -> Rows:
    """Streams of `Rows` -> `Rows` of [B, T + V + G]."""
    return Rows(*(jnp.concatenate(field, axis=1) for field in zip(*rows)))
