"""Attention under the visibility rule, block of queries by block of queries.

Axes: B packs, S queries, C keys, N query heads, K key-value heads, R = N / K, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_pipelines.batch import INF, Rows, visible

BLOCK = 512  # queries at once: score memory is B N BLOCK C, never O(S^2)


def _attend_block(query, key, value, query_rows: Rows, key_rows: Rows):
    """One block of queries [B S K R H] against all keys; scores and softmax in float32."""
    scale = query.shape[-1] ** -0.5
    score = jnp.einsum("bskrh,bckh->bkrsc", query, key, preferred_element_type=jnp.float32) * scale
    mask = visible(query_rows, key_rows)[:, None, None]
    score = jnp.where(mask, score, -jnp.inf)
    # A query that sees nothing (padding) gets zeros: its maximum is -inf, its sum of weights zero.
    top = jax.lax.stop_gradient(jnp.max(score, -1, keepdims=True))
    weight = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weight, -1, keepdims=True)
    weight = (weight / jnp.where(total > 0, total, 1.0)).astype(value.dtype)
    return jnp.einsum("bkrsc,bckh->bskrh", weight, value)


def attend(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K H"],
    query_rows: Rows,
    key_rows: Rows,
) -> Float[Array, "B S N H"]:
    """softmax(q k / sqrt(H)) v over the visible keys; N / K queries share a key head.

    Rows are int32 [B, S] and [B, C]. Memory is linear in S and C; the backward pass recomputes scores.
    """
    batch, length, heads, size = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    if length <= BLOCK:
        return _attend_block(query, key, value, query_rows, key_rows).reshape(batch, length, heads, size)

    pad = -length % BLOCK
    def blocks(x, fill=0):  # [B, S, ...] -> [S / BLOCK, B, BLOCK, ...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, BLOCK, *x.shape[2:]), 1, 0)
    rows = Rows(blocks(query_rows.order, INF), blocks(query_rows.first, INF), blocks(query_rows.span),
                blocks(query_rows.last, -1), blocks(query_rows.noised), blocks(query_rows.rope))
    one = jax.checkpoint(lambda xs: _attend_block(xs[0], key, value, xs[1], key_rows))
    out = jax.lax.map(one, (blocks(query), rows))
    return jnp.moveaxis(out, 0, 1).reshape(batch, length + pad, heads, size)[:, :length]
