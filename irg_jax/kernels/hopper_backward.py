"""Fused attention for Hopper GPUs (sm_90a): the pass backwards, as two kernels without atomics.

Axes: B packs, K key-value heads, R query heads a key head, N = K R, S queries, C keys, H head size.

Gradients of queries are a walk over the list in order of queries, those of keys and values one over the list in
order of keys, of all R heads in turn, so that their sums never leave the registers: scores are computed twice
(7 products a pair of tiles where one walk has 5), and every run gives the same bits. Blocks are those of
`hopper`: two warpgroups multiply, one copies ahead.

Budget of a block (H = 128): queries and gradients of outputs of the tile 64 KiB, two slots of keys and values
128 KiB; or keys and values of the tile 64 KiB, four slots of 64 queries 128 KiB. Registers a thread: sums of
queries 64, scores 64, gradients of weights 64; or sums of keys 64 and of values 64, scores 32, gradients of
weights 32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from irg_jax.kernels.hopper import (
    ACROSS,
    COPYING,
    DOWN,
    GRID,
    LOG2E,
    MULTIPLIERS,
    MULTIPLYING,
    ROWS,
    SETTINGS,
    TILE,
    Work,
    check,
    feed,
    fill,
    mask,
    spread,
    tiled_memory,
    whole_tiles,
)
from irg_jax.kernels.tiles import key_tile

SLOTS = 4      # of 64 queries


def backward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
             d_out: Float[Array, "B K R S H"], logsum: Float[Array, "B K R S"], share: Float[Array, "B K R S"],
             work: Work, *, interpret=False
             ) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K C H"], Float[Array, "B K C H"]]:
    """Gradients of queries (their dtype), keys and values (float32, for the others have them so; they were
    rounded to bfloat16 once); `share` is d_out . out.

    Raises: ValueError if heads are not of a size and dtype that the kernels are made for.
    """
    check(query, key, value, d_out)
    of_queries, of_keys = query.shape, key.shape
    query, key, value, d_out, logsum, share = whole_tiles(work, query, key, value, d_out, logsum, share)
    numbers = jnp.stack([logsum * LOG2E, share], axis=1)
    integers, arrays = (work.query, work.key), (query, key, value, d_out, numbers)
    d_query = _of_queries(of_queries, query.dtype, work, interpret)(*work.by_query, *integers, *arrays)
    d_key, d_value = _of_keys(of_keys, key, work, interpret)(*work.by_key, *integers, *arrays)
    cut = lambda x: x.reshape(*of_keys[:2], -1, of_keys[3])[:, :, :of_keys[2]].astype(jnp.float32)
    return (d_query.reshape(*of_queries[:3], -1, of_queries[4])[:, :, :, :of_queries[3]], cut(d_key),
            cut(d_value))


def _of_queries(shape, dtype, work: Work, interpret):
    packs, groups, shared, _, size = shape
    slots = 256 // size
    tiled = lambda *shape: tiled_memory(shape, dtype)
    return plgpu.kernel(
        _query_kernel,
        out_type=jax.ShapeDtypeStruct((packs * groups * shared, work.query.shape[2], size), dtype),
        scratch_types=dict(
            queries=tiled(MULTIPLIERS, ROWS, size), d_outs=tiled(MULTIPLIERS, ROWS, size),
            keys=tiled(slots, TILE, size), values=tiled(slots, TILE, size),
            of_queries=plgpu.SMEM((MULTIPLIERS, 4, ROWS), jnp.int32),
            of_keys=plgpu.SMEM((slots, 2, TILE), jnp.int32),
            numbers=plgpu.SMEM((MULTIPLIERS, 2, ROWS), jnp.float32),
            queries_here=plgpu.Barrier(num_arrivals=4, num_barriers=MULTIPLIERS),
            here=plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            done=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=slots)),
        grid=(packs, work.by_query.turns.shape[2], groups * shared), interpret=interpret, **SETTINGS)


def _query_kernel(entries, turns, query_integers, key_integers, query, key, value, d_out, all_numbers, d_query,
                  *, queries, d_outs, keys, values, of_queries, of_keys, numbers, queries_here, here, done):
    pack, turn, head = (jax.lax.axis_index(name) for name in GRID)
    me, slots, heads = jax.lax.axis_index("warpgroup"), keys.shape[0], jax.lax.axis_size("head")
    tile, start, count = (turns[pack, i, turn] for i in range(3))
    of_head = pack * heads + head

    @pl.when(me == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(COPYING, action="decrease")
        of_key = jax.lax.div(of_head, query.shape[0] // key.shape[0])

        def copy(step, slot):
            place = pl.ds(key_tile(entries[pack, 0, start + step]) * TILE, TILE)
            for source, target in ((key.at[of_key, place], keys), (value.at[of_key, place], values),
                                   (key_integers.at[pack, pl.ds(0, 2), place], of_keys)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], here.at[slot])
        feed(count, slots, (done, copy))

    @pl.when(me < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        place = pl.ds(tile * TILE + me * ROWS, ROWS)
        for source, target in ((query.at[of_head, place], queries), (d_out.at[of_head, place], d_outs),
                               (query_integers.at[pack, pl.ds(0, 4), place], of_queries),
                               (all_numbers.at[of_head, pl.ds(0, 2), place], numbers)):
            plgpu.copy_gmem_to_smem(source, target.at[me], queries_here.at[me])
        plgpu.barrier_wait(queries_here.at[me])
        logsum, share = (plgpu.load(numbers.at[me], (i,), layout=ACROSS) for i in range(2))

        def visit(step, total):
            slot = jax.lax.rem(step, slots)
            plgpu.barrier_wait(here.at[slot])
            score, d_weight = _multiply_both(queries.at[me], keys.at[slot], d_outs.at[me], values.at[slot])
            score = mask(entries[pack, 0, start + step], score, of_queries.at[me], of_keys.at[slot], axis=0)
            _, d_score = _differentiate(score, d_weight, logsum, share, axis=0)
            total, = _add_products((total,), (d_score.astype(query.dtype),), (keys.at[slot],))
            plgpu.barrier_arrive(done.at[slot])
            return total
        total = jax.lax.fori_loop(0, count, visit, fill((ROWS, queries.shape[2]), 0.0, plgpu.Layout.WGMMA))
        queries[me] = total.astype(d_query.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries.at[me], d_query.at[of_head, place])
        plgpu.wait_smem_to_gmem(0)


def _of_keys(shape, like, work: Work, interpret):
    packs, groups, _, size = shape
    tiled = lambda *shape: tiled_memory(shape, like.dtype)
    return plgpu.kernel(
        _key_kernel, out_type=(like, like),
        scratch_types=dict(
            keys=tiled(MULTIPLIERS, ROWS, size), values=tiled(MULTIPLIERS, ROWS, size),
            queries=tiled(SLOTS, ROWS, size), d_outs=tiled(SLOTS, ROWS, size),
            of_keys=plgpu.SMEM((MULTIPLIERS, 2, ROWS), jnp.int32),
            of_queries=plgpu.SMEM((SLOTS, 4, ROWS), jnp.int32),
            numbers=plgpu.SMEM((SLOTS, 2, ROWS), jnp.float32),
            keys_here=plgpu.Barrier(num_arrivals=3, num_barriers=MULTIPLIERS),
            here=plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            done=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=SLOTS)),
        grid=(packs, work.by_key.turns.shape[2], groups), interpret=interpret, **SETTINGS)


def _key_kernel(entries, turns, query_integers, key_integers, query, key, value, d_out, all_numbers,
                d_key, d_value, *, keys, values, queries, d_outs, of_keys, of_queries, numbers, keys_here, here,
                done):
    pack, turn, group = (jax.lax.axis_index(name) for name in GRID)
    me, groups = jax.lax.axis_index("warpgroup"), jax.lax.axis_size("head")
    tile, start, count = (turns[pack, i, turn] for i in range(3))
    halves, shared = TILE // ROWS, query.shape[0] // key.shape[0]
    of_group, steps = pack * groups + group, count * halves * shared
    entry_of = lambda step: entries[pack, 0, start + jax.lax.rem(jax.lax.div(step, halves), count)]

    @pl.when(me == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(COPYING, action="decrease")

        def copy(step, slot):
            of_head = of_group * shared + jax.lax.div(step, count * halves)
            place = pl.ds(key_tile(entry_of(step)) * TILE + jax.lax.rem(step, halves) * ROWS, ROWS)
            for source, target in ((query.at[of_head, place], queries), (d_out.at[of_head, place], d_outs),
                                   (query_integers.at[pack, pl.ds(0, 4), place], of_queries),
                                   (all_numbers.at[of_head, pl.ds(0, 2), place], numbers)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], here.at[slot])
        feed(steps, SLOTS, (done, copy))

    @pl.when(me < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        place = pl.ds(tile * TILE + me * ROWS, ROWS)
        for source, target in ((key.at[of_group, place], keys), (value.at[of_group, place], values),
                               (key_integers.at[pack, pl.ds(0, 2), place], of_keys)):
            plgpu.copy_gmem_to_smem(source, target.at[me], keys_here.at[me])
        plgpu.barrier_wait(keys_here.at[me])

        def visit(step, totals):
            slot = jax.lax.rem(step, SLOTS)
            plgpu.barrier_wait(here.at[slot])
            score, d_weight = _multiply_both(keys.at[me], queries.at[slot], values.at[me], d_outs.at[slot])
            score = mask(entry_of(step), score, of_queries.at[slot], of_keys.at[me], axis=1)
            logsum, share = (plgpu.load(numbers.at[slot], (i,), layout=DOWN) for i in range(2))
            both = _differentiate(score, d_weight, logsum, share, axis=1)
            totals = _add_products(totals, [x.astype(key.dtype) for x in both],
                                   (d_outs.at[slot], queries.at[slot]))
            plgpu.barrier_arrive(done.at[slot])
            return totals
        none = fill((ROWS, keys.shape[2]), 0.0, plgpu.Layout.WGMMA)
        totals = jax.lax.fori_loop(0, steps, visit, (none, none))
        for total, memory, target in zip(totals, (values, keys), (d_value, d_key), strict=True):
            memory[me] = total.astype(target.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory.at[me], target.at[of_group, place])
        plgpu.wait_smem_to_gmem(0)


def _multiply_both(left, right, other_left, other_right):
    """left @ right.T and other_left @ other_right.T, in registers."""
    def run(one, other):
        plgpu.wgmma(one, left, plgpu.transpose_ref(right, (1, 0)))
        plgpu.wgmma(other, other_left, plgpu.transpose_ref(other_right, (1, 0)))
        return one[...], other[...]
    sums = plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32)
    return pl.run_scoped(run, sums, sums)


def _add_products(sums, lefts, rights):
    """Each of `sums` + left @ right."""
    def run(refs):
        for ref, left, right in zip(refs, lefts, rights, strict=True):
            plgpu.wgmma(ref, left, right)
    return pl.run_state(run)(tuple(map(plgpu.ACC.init, sums)))


def _differentiate(score, d_weight, logsum, share, axis: int):
    """Weights of a tile, and the gradients of its scores; `logsum` is one in base 2."""
    weight = jnp.exp2(score * LOG2E - spread(logsum, score, axis))
    return weight, weight * (d_weight - spread(share, score, axis))
