"""Attention under the visibility rule in plain XLA, few packs and a block of queries at once.

Axes: B packs, K key-value heads, R query heads a key head, S queries, C keys, M = R S, H head size.
Scores and softmax are float32; matmuls take the dtype of their inputs and add up in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from data_pipelines.batch import INF, Rows, visible

BLOCK = 512      # queries at once: score memory is never O(S^2)
SCORES = 2**20   # at once, where packs are small: what a core's cache holds; why: docs/performance.md


def forward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
            query_rows: Rows, key_rows: Rows) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K R S"]]:
    """Attention of scaled queries, and the logarithm of the sum of their weights (float32)."""
    return _over_packs(_forward, query, key, value, query_rows, key_rows)


def _forward(query, key, value, query_rows: Rows, key_rows: Rows):
    def block(carry, query, rows):
        seen, score = _seen(rows, key_rows), _times(query, key)
        top = jnp.max(jnp.where(seen, score, -jnp.inf), -1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        weight = jnp.where(seen, jnp.exp(score - top), 0.0)
        total = jnp.sum(weight, -1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        out = _mix(weight.astype(value.dtype), value) / total
        return carry, (out.astype(value.dtype), top + jnp.log(total))
    _, (out, logsum) = _over_blocks(block, (), query_rows, query)
    return out, logsum[..., 0]


def backward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
             d_out: Float[Array, "B K R S H"], logsum: Float[Array, "B K R S"], share: Float[Array, "B K R S"],
             query_rows: Rows, key_rows: Rows
             ) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K C H"], Float[Array, "B K C H"]]:
    """Gradients of queries (their dtype), keys and values (float32); `share` is d_out . out."""
    return _over_packs(_backward, query, key, value, d_out, logsum, share, query_rows, key_rows)


def _backward(query, key, value, d_out, logsum, share, query_rows: Rows, key_rows: Rows):
    logsum, share = logsum[..., None], share[..., None]

    def block(carry, query, d_out, logsum, share, rows):
        weight = jnp.where(_seen(rows, key_rows), jnp.exp(_times(query, key) - logsum), 0.0)
        d_score = (weight * (_times(d_out, value) - share)).astype(key.dtype)
        d_key, d_value = _collect(d_score, query), _collect(weight.astype(value.dtype), d_out)
        return jax.tree.map(jnp.add, carry, (d_key, d_value)), _mix(d_score, key).astype(query.dtype)
    zero = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    (d_key, d_value), d_query = _over_blocks(block, zero, query_rows, query, d_out, logsum, share)
    return d_query, d_key, d_value


def _seen(query_rows: Rows, key_rows: Rows):
    """bool [B 1 1 S C]."""
    return visible(query_rows, key_rows)[:, None, None]


def _rows(x):
    return rearrange(x, "b k r s x -> b k (r s) x")


def _times(query, key):
    """[B K R S H], [B K C H] -> float32 [B K R S C]."""
    score = jnp.einsum("bkmh,bkch->bkmc", _rows(query), key, preferred_element_type=jnp.float32)
    return score.reshape(*query.shape[:4], key.shape[2])


def _mix(weight, value):
    """[B K R S C], [B K C H] -> float32 [B K R S H]."""
    mixed = jnp.einsum("bkmc,bkch->bkmh", _rows(weight), value, preferred_element_type=jnp.float32)
    return mixed.reshape(*weight.shape[:4], value.shape[3])


def _collect(weight, query):
    """[B K R S C], [B K R S H] -> float32 [B K C H]."""
    return jnp.einsum("bkmc,bkmh->bkch", _rows(weight), _rows(query), preferred_element_type=jnp.float32)


def _over_packs(attention: Callable, query, key, *rest):
    """`attention` of as many packs at once as make SCORES scores: passes over scores out of cache are slow."""
    packs, heads, group, length = query.shape[:4]
    at_once = SCORES // max(heads * group * min(length, BLOCK) * key.shape[2], 1)
    if packs <= max(at_once, 1):
        return attention(query, key, *rest)
    one = lambda arrays: jax.tree.map(lambda x: x[0], attention(*jax.tree.map(lambda x: x[None], arrays)))
    return jax.lax.map(one, (query, key, *rest), batch_size=at_once if at_once > 1 else None)


def _over_blocks(block: Callable, carry, rows: Rows, *per_query):
    """Scans `block(carry, *slices [B K R BLOCK ...], their rows) -> (carry, results)` over the queries."""
    length = rows.order.shape[1]
    if length <= BLOCK:
        return block(carry, *per_query, rows)
    pad = -length % BLOCK

    def cut(x, axis, fill=0):    # length -> [blocks, ..., BLOCK, ...]
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
        return jnp.stack(jnp.split(x, x.shape[axis] // BLOCK, axis))

    def paste(x):                # its inverse, for results of queries
        return rearrange(x, "n b k r s x -> b k r (n s) x")[:, :, :, :length]
    rows = Rows(cut(rows.order, 1, INF), cut(rows.first, 1, INF), cut(rows.span, 1), cut(rows.last, 1, -1),
                cut(rows.noised, 1), cut(rows.rope, 1))
    blocks = (*(cut(x, 3) for x in per_query), rows)
    carry, results = jax.lax.scan(lambda carry, xs: block(carry, *xs), carry, blocks)
    return carry, jax.tree.map(paste, results)
