"""Attention under the visibility rule, block of queries by block of queries.

Axes: B packs, S queries, C keys, N query heads, K key-value heads, R = N / K, H head size.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from data_pipelines.batch import INF, Rows, visible

BLOCK = 512  # queries at once: score memory is B N BLOCK C, never O(S^2)


def _attend_block(query, key, value, query_rows: Rows, key_rows: Rows):
    """One block of queries [B K S R H] against all keys [B K C H]; scores and softmax in float32.

    Heads lead and the queries that share a key head lie side by side: XLA on CPUs then calls one plain
    matmul a head, four times faster than contracting over inner axes.
    """
    batch, heads, length, shared, size = query.shape
    query = query.reshape(batch, heads, length * shared, size) * size**-0.5
    score = jnp.einsum("bkmh,bkch->bkmc", query, key, preferred_element_type=jnp.float32)
    score = score.reshape(batch, heads, length, shared, -1)
    score = jnp.where(visible(query_rows, key_rows)[:, None, :, None], score, -jnp.inf)
    # A query that sees nothing (padding) gets zeros: its maximum is -inf, its sum of weights zero.
    top = jax.lax.stop_gradient(jnp.max(score, -1, keepdims=True))
    weight = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weight, -1, keepdims=True)
    weight = (weight / jnp.where(total > 0, total, 1.0)).astype(value.dtype)
    out = jnp.einsum("bkmc,bkch->bkmh", weight.reshape(batch, heads, length * shared, -1), value)
    return out.reshape(batch, heads, length, shared, size)


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
    length = query.shape[1]
    if not length:   # a stream without tokens, e.g. `vit_tokens` is 0
        return query
    query = rearrange(query, "b s (k r) h -> b k s r h", k=key.shape[2])
    key, value = (rearrange(x, "b c k h -> b k c h") for x in (key, value))
    if length <= BLOCK:
        out = _attend_block(query, key, value, query_rows, key_rows)
        return rearrange(out, "b k s r h -> b s (k r) h")

    pad = -length % BLOCK
    def blocks(x, axis, fill=0):  # length -> [blocks, ..., BLOCK, ...]
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
        return jnp.stack(jnp.split(x, x.shape[axis] // BLOCK, axis))
    rows = Rows(blocks(query_rows.order, 1, INF), blocks(query_rows.first, 1, INF), blocks(query_rows.span, 1),
                blocks(query_rows.last, 1, -1), blocks(query_rows.noised, 1), blocks(query_rows.rope, 1))
    one = jax.checkpoint(lambda xs: _attend_block(xs[0], key, value, xs[1], key_rows))
    out = jax.lax.map(one, (blocks(query, 2), rows))
    return rearrange(out, "n b k s r h -> b (n s) (k r) h")[:, :length]
