"""Fused attention for TPUs: two Pallas kernels that walk the same list of tiles, forwards and backwards.

Axes: B packs, K key-value heads, R query heads a key head, S queries, C keys, H head size, W work list.

A step of the grid is one tile of queries of all R heads that share a key head, against one tile of keys: keys,
values and the mask are fetched and made once for R heads. Scores stand on their side, keys down and queries
across, so that maxima and sums run down the sublanes (plain vector operations) and what belongs to a query is
a row. Matmuls take the dtype of their inputs and add up in float32; scores and softmax are float32.

The backward pass is one walk, five matmuls a pair of tiles: gradients of queries add up as the walk stays on
their tile, gradients of keys and values in VMEM for the whole length of a key head (8 C H bytes: 40 MiB at
40,960 tokens of 128), from where each is written once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from irg_jax.kernels.tiles import EMPTY, FIRST, LAST, MASKED, key_tile, pad_axis, pick_keys, query_tile

HIDDEN = -1e30                   # added to the score of a pair that is not visible
VMEM_LIMIT = 60 * 2**20          # v5p and v7x have 64 MiB, v5e and v6e 128
SUMS = 48 * 2**20                # of it for gradients of keys and values; longer packs take several walks


class Work(NamedTuple):
    """What `tiles` makes of the rows of a pack, with padding up to whole tiles."""

    entries: Int[Array, "B W"]
    count: Int[Array, "B 1"]
    query: Int[Array, "B 8 S"]
    key: Int[Array, "B 8 C"]


def forward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
            work: Work, *, tile: int, interpret=False
            ) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K R S"]]:
    """Attention of scaled queries, and the logarithm of the sum of their weights (float32)."""
    length, shared, size = query.shape[3], query.shape[2], query.shape[4]
    query, key, value = _whole(tile, query, key, value)
    of_query, of_key = _specs(work, tile, size, shared)
    call = _call(_forward_kernel, work, query, key, interpret,
                 in_specs=[of_query.integers, of_key.integers, of_query.heads, of_key.heads, of_key.heads],
                 out_specs=(of_query.heads, of_query.numbers),
                 scratch_shapes=[pltpu.VMEM((shared, size, tile), jnp.float32),
                                 pltpu.VMEM((shared, tile), jnp.float32),
                                 pltpu.VMEM((shared, tile), jnp.float32)],
                 out_shape=(query, jax.ShapeDtypeStruct(query.shape[:4], jnp.float32)), matmuls=2)
    out, logsum = call(work.query, work.key, query, key, value)
    return out[:, :, :, :length], logsum[:, :, :, :length]


def backward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
             d_out: Float[Array, "B K R S H"], logsum: Float[Array, "B K R S"], share: Float[Array, "B K R S"],
             work: Work, *, tile: int, interpret=False
             ) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K C H"], Float[Array, "B K C H"]]:
    """Gradients of queries (their dtype), keys and values (float32); `share` is d_out . out."""
    queries, keys = query.shape[3], key.shape[2]
    heads = _whole(tile, query, key, value, d_out, logsum, share)
    length = SUMS // (8 * query.shape[4]) // tile * tile
    if keys <= length:
        d_query, *d_keys = _backward(*heads, work, tile, interpret)
    else:
        query, key, value, *rest = heads
        parts = [_backward(query, *(x[:, :, start:start + length] for x in (key, value)), *rest,
                           _part_of(work, start // tile, length // tile, tile), tile, interpret)
                 for start in range(0, key.shape[2], length)]
        d_query = sum(part[0].astype(jnp.float32) for part in parts).astype(query.dtype)
        d_keys = [jnp.concatenate(x, axis=2) for x in list(zip(*parts))[1:]]
    return d_query[:, :, :, :queries], *(x[:, :, :keys] for x in d_keys)


def _backward(query, key, value, d_out, logsum, share, work: Work, tile: int, interpret):
    shared, size = query.shape[2], query.shape[4]
    of_query, of_key = _specs(work, tile, size, shared)
    whole = jax.ShapeDtypeStruct(key.shape, jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = _call(_backward_kernel, work, query, key, interpret,
                 in_specs=[of_query.integers, of_key.integers, of_query.heads, of_key.heads, of_key.heads,
                           of_query.heads, of_query.numbers, of_query.numbers],
                 out_specs=(of_query.heads, anywhere, anywhere),
                 scratch_shapes=[pltpu.VMEM((shared, size, tile), jnp.float32),
                                 pltpu.VMEM(key.shape[2:], jnp.float32),
                                 pltpu.VMEM(key.shape[2:], jnp.float32)],
                 out_shape=(query, whole, whole), matmuls=5)
    return call(work.query, work.key, query, key, value, d_out, logsum, share)


def _part_of(work: Work, start: int, count: int, tile: int) -> Work:
    """The work on `count` tiles of keys from `start`; what remains of the rest is steps without work."""
    return work._replace(entries=pick_keys(work.entries, start, count),
                         key=work.key[:, :, start * tile:(start + count) * tile])


def _whole(tile: int, query, key, value, *of_query):
    """The same arrays with whole tiles of queries and keys."""
    return (pad_axis(query, 3, tile), pad_axis(key, 2, tile), pad_axis(value, 2, tile),
            *(pad_axis(x, 3, tile) for x in of_query))


class _Specs(NamedTuple):
    """Blocks of one tile: its integers, its heads, and one number a query and head."""

    integers: pl.BlockSpec
    heads: pl.BlockSpec
    numbers: pl.BlockSpec | None = None


def _specs(work: Work, tile: int, size: int, shared: int) -> tuple[_Specs, _Specs]:
    width = work.entries.shape[1]

    def at(tile_of, place):
        return lambda b, k, w, entries: place(b, k, tile_of(entries[b * width + w]))
    of_query, of_key = functools.partial(at, query_tile), functools.partial(at, key_tile)
    return (_Specs(pl.BlockSpec((None, 8, tile), of_query(lambda b, k, i: (b, 0, i))),
                   pl.BlockSpec((None, None, shared, tile, size), of_query(lambda b, k, i: (b, k, 0, i, 0))),
                   pl.BlockSpec((None, None, shared, tile), of_query(lambda b, k, i: (b, k, 0, i)))),
            _Specs(pl.BlockSpec((None, 8, tile), of_key(lambda b, k, i: (b, 0, i))),
                   pl.BlockSpec((None, None, tile, size), of_key(lambda b, k, i: (b, k, i, 0)))))


def _call(kernel, work: Work, query, key, interpret, *, matmuls: int, **blocks):
    """The kernel over packs, key heads and as many entries as the longest list has."""
    packs, width = work.entries.shape
    heads, pairs = key.shape[1], query.size * key.shape[2]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(packs, heads, jnp.max(work.count)), in_specs=blocks["in_specs"],
        out_specs=blocks["out_specs"], scratch_shapes=blocks["scratch_shapes"])
    # As if every tile were visited: what is visited is known when it runs.
    cost = pl.CostEstimate(flops=2 * matmuls * pairs, transcendentals=pairs // query.shape[4],
                           bytes_accessed=2 * (query.nbytes + key.nbytes))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blocks["out_shape"])
    call = pl.pallas_call(
        functools.partial(kernel, width), grid_spec=grid, out_shape=shapes, cost_estimate=cost,
        interpret=interpret, name=kernel.__name__.strip("_"),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_LIMIT))
    return functools.partial(call, work.entries.reshape(-1))


def _entry(width: int, entries):
    return entries[pl.program_id(0) * width + pl.program_id(2)]


def _dot(left, right, axes: tuple[int, int]):
    """Sums over axis `axes[0]` of the left and `axes[1]` of the right, in float32.

    Products of bfloat16 are exact in one pass: a higher precision that is set for a program is for float32.
    """
    precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _hidden(query_integers, key_integers):
    """[keys, queries]: 0 where the pair is visible and HIDDEN elsewhere."""
    first, span, last = (query_integers[i:i + 1] for i in range(3))
    columns = key_integers[...].T
    order, hidden = columns[:, 0:1], columns[:, 1:2]
    return jnp.where((order >= first) & (order <= last) & (hidden >= span), 0.0, HIDDEN)


def _visit(entry, query_integers, key_integers, body) -> None:
    """Runs `body` on the scores of a tile: they are masked only where that is needed."""
    @pl.when(entry & (MASKED | EMPTY) == MASKED)
    def _():
        hidden = _hidden(query_integers, key_integers)
        body(lambda score: score + hidden)

    @pl.when(entry & (MASKED | EMPTY) == 0)
    def _():
        body(lambda score: score)


def _forward_kernel(width, entries, query_integers, key_integers, query, key, value, out, logsum,
                    mixed, top, total):
    entry, heads = _entry(width, entries), query.shape[0]

    @pl.when(entry & FIRST != 0)
    def _():
        mixed[...], total[...] = jnp.zeros_like(mixed), jnp.zeros_like(total)
        top[...] = jnp.full_like(top, HIDDEN)

    def body(mask):
        for head in range(heads):
            row = pl.ds(head, 1)
            score = mask(_dot(key[...], query[head], (1, 1)))
            before, best = top[row], jnp.maximum(top[row], jnp.max(score, 0, keepdims=True))
            base = _or_zero(best)    # where nothing was visible yet, every weight must be 0
            weight, rest = jnp.exp(score - base), jnp.exp(before - base)
            top[row] = best
            total[row] = total[row] * rest + jnp.sum(weight, 0, keepdims=True)
            mixed[head] = mixed[head] * rest + _dot(value[...], weight.astype(value.dtype), (0, 0))
    _visit(entry, query_integers, key_integers, body)

    @pl.when(entry & LAST != 0)
    def _():
        for head in range(heads):
            row = pl.ds(head, 1)
            divisor = jnp.where(total[row] > 0, total[row], 1.0)
            out[head] = (mixed[head] / divisor).T.astype(out.dtype)
            logsum[row] = _or_zero(top[row]) + jnp.log(divisor)


def _or_zero(top):
    return jnp.where(top > HIDDEN / 2, top, 0.0)


def _backward_kernel(width, entries, query_integers, key_integers, query, key, value, d_out, logsum, share,
                     d_query, d_key, d_value, sum_query, sum_key, sum_value):
    pack, head_of_keys, step = (pl.program_id(axis) for axis in range(3))
    entry, heads, tile = _entry(width, entries), query.shape[0], key.shape[0]

    @pl.when(step == 0)
    def _():
        sum_key[...], sum_value[...] = jnp.zeros_like(sum_key), jnp.zeros_like(sum_value)

    @pl.when(entry & FIRST != 0)
    def _():
        sum_query[...] = jnp.zeros_like(sum_query)

    def body(mask):
        place = pl.ds(pl.multiple_of(key_tile(entry) * tile, tile), tile)
        of_key, of_value = sum_key[place], sum_value[place]
        for head in range(heads):
            row = pl.ds(head, 1)
            weight = jnp.exp(mask(_dot(key[...], query[head], (1, 1))) - logsum[row])
            of_value += _dot(weight.astype(d_out.dtype), d_out[head], (1, 0))
            d_score = weight * (_dot(value[...], d_out[head], (1, 1)) - share[row])
            d_score = d_score.astype(query.dtype)
            of_key += _dot(d_score, query[head], (1, 0))
            sum_query[head] += _dot(key[...], d_score, (0, 0))
        sum_key[place], sum_value[place] = of_key, of_value
    _visit(entry, query_integers, key_integers, body)

    @pl.when(entry & LAST != 0)
    def _():
        for head in range(heads):
            d_query[head] = sum_query[head].T.astype(d_query.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        pltpu.sync_copy(sum_key, d_key.at[pack, head_of_keys])
        pltpu.sync_copy(sum_value, d_value.at[pack, head_of_keys])
