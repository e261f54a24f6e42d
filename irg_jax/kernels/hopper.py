"""Fused attention for Hopper GPUs (sm_90a): the pass forwards; `hopper_backward` has the other.

Axes: B packs, K key-value heads, R query heads a key head, N = K R, S queries, C keys, H head size.

A block is one tile of 128 queries of one head: one warpgroup copies tiles of keys and values (TMA) into a ring
in shared memory, and two warpgroups, 64 queries each, multiply (wgmma) and keep a softmax in base 2. They take
turns, so that one has the tensor cores while the other is at its exponentials. A block looks up in the list
of work which tiles to visit; heads are the innermost axis of the grid, so that blocks that run together share
keys and values in L2, and long lists come first.

Budget of a block (H = 128; 227 KiB of shared memory, 65,536 registers): queries 32 KiB, later the result; two
slots of keys and values 128 KiB; integers 4 KiB; reductions 2 KiB: one block an SM. Registers a thread: 232 for
those that multiply (sums 64, scores 64, weights 32, and 64 integers of keys while a tile is masked), 40 for
the one that copies: 128 (2 x 232 + 40) = 64,512. H = 64 has four slots of half the size. ptxas for sm_90a,
which needs no GPU, spills nothing here and in the gradients of queries, and 4 bytes in those of keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.batch import Rows
from irg_jax.kernels.tiles import (
    MASKED,
    Turns,
    key_integers,
    key_tile,
    map_tiles,
    pad_rows,
    query_integers,
    take_turns,
)

TILE = 128           # queries and keys of a tile
ROWS = 64            # of a tile, for one warpgroup: what a wgmma takes
MULTIPLIERS = 2      # warpgroups that multiply; one more copies
MULTIPLYING, COPYING = 232, 40    # registers a thread; together no more than 3 x 168, which a block begins with
SIZES = (64, 128)    # of a head
LOG2E = math.log2(math.e)
ACROSS, DOWN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)   # a number a row, a number a column
GRID = ("pack", "turn", "head")


class Work(NamedTuple):
    """What `tiles` makes of the rows of a pack, with padding up to whole tiles; each device's own."""

    by_query: Turns
    by_key: Turns
    query: Int[Array, "B 8 S"]
    key: Int[Array, "B 8 C"]


def prepare(query: Rows, key: Rows) -> Work:
    """The work of queries [B, S] over keys [B, C]."""
    query, key = pad_rows(query, TILE), pad_rows(key, TILE)
    visited, full = map_tiles(query, key, TILE)
    return Work(take_turns(visited, full), take_turns(visited.mT, full.mT),
                query_integers(query), key_integers(key))


def is_present() -> bool:
    """Whether the devices that programs are compiled for here are Hopper GPUs."""
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")


def accepts(size: int, dtype) -> bool:
    """Whether the kernels are made for such heads."""
    return size in SIZES and dtype == jnp.bfloat16


def forward(query: Float[Array, "B K R S H"], key: Float[Array, "B K C H"], value: Float[Array, "B K C H"],
            work: Work, *, interpret=False) -> tuple[Float[Array, "B K R S H"], Float[Array, "B K R S"]]:
    """Attention of scaled queries, and the logarithm of the sum of their weights (float32).

    Raises: ValueError if heads are not of a size and dtype that the kernel is made for.
    """
    check(query, key, value)
    shape, dtype = query.shape, query.dtype
    query, key, value = whole_tiles(work, query, key, value)
    slots = 256 // shape[4]
    tiled = lambda *shape: tiled_memory(shape, dtype)
    out, logsum = plgpu.kernel(
        _forward_kernel,
        out_type=(query, jax.ShapeDtypeStruct(query.shape[:2], jnp.float32)),
        scratch_types=dict(
            queries=tiled(MULTIPLIERS, ROWS, shape[4]), keys=tiled(slots, TILE, shape[4]),
            values=tiled(slots, TILE, shape[4]), of_queries=plgpu.SMEM((MULTIPLIERS, 4, ROWS), jnp.int32),
            of_keys=plgpu.SMEM((slots, 2, TILE), jnp.int32),
            sums=plgpu.SMEM((MULTIPLIERS, ROWS), jnp.float32),
            queries_here=plgpu.Barrier(num_arrivals=2, num_barriers=MULTIPLIERS),
            keys_here=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            values_here=plgpu.Barrier(num_barriers=slots),
            keys_done=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=slots),
            values_done=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=slots),
            handover=plgpu.Barrier(num_arrivals=MULTIPLIERS)),
        grid=(shape[0], work.by_query.turns.shape[2], shape[1] * shape[2]), interpret=interpret, **SETTINGS,
    )(*work.by_query, work.query, work.key, query, key, value)
    cut = lambda x: x.reshape(*shape[:3], *x.shape[1:])[:, :, :, :shape[3]]
    return cut(out), cut(logsum)


SETTINGS = dict(grid_names=GRID, num_threads=MULTIPLIERS + 1, thread_name="warpgroup",
                compiler_params=plgpu.CompilerParams(approx_math=True))


def check(*heads) -> None:
    """Raises: ValueError if heads are not of a size and dtype that the kernels are made for."""
    for x in heads:
        if not accepts(x.shape[-1], x.dtype):
            raise ValueError(f"heads are {x.shape[-1]} {x.dtype}; the kernels for Hopper are made for heads of "
                             f"{' and '.join(map(str, SIZES))} bfloat16: choose \"auto\", which knows")


def whole_tiles(work: Work, query, key, value, *of_query):
    """Whole tiles of each, packs and heads together: [B N S ...] and [B K C ...] with one leading axis."""
    def fill(x, axis, length):
        x = jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
        return x.reshape(math.prod(x.shape[:axis]), *x.shape[axis:])
    queries, keys = work.query.shape[2], work.key.shape[2]
    return fill(query, 3, queries), fill(key, 2, keys), fill(value, 2, keys), *(
        fill(x, 3, queries) for x in of_query)


def tiled_memory(shape: tuple[int, ...], dtype):
    """Shared memory in the layout that wgmma reads without conflicts of banks."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def feed(count, slots: int, *streams) -> None:
    """Fills the slots of a ring `count` times, each after those who used it last have said so.

    Args: streams are pairs (barriers of slots that are done, function of step and slot that copies).
    """
    @pl.loop(0, count + slots)
    def _(step):
        slot = jax.lax.rem(step, slots)
        for done, copy in streams:
            @pl.when(step >= slots)
            def _(done=done):
                plgpu.barrier_wait(done.at[slot])

            @pl.when(step < count)
            def _(copy=copy):
                copy(step, slot)


def multiply(left, right, shape: tuple[int, int], meanwhile=lambda: None):
    """left @ right in float32, in registers; `meanwhile` runs while the tensor cores work."""
    def run(sums):
        plgpu.wgmma(sums, left, right)
        meanwhile()
        return sums[...]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_product(sums, left, right):
    """sums + left @ right."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(sums))


def fill(shape, value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(numbers, like, axis: int):
    """Numbers of the rows (axis 0) or of the columns (axis 1) of a tile, for the whole of it."""
    return jax.lax.broadcast_in_dim(numbers, like.shape, [axis])


def is_visible(of_queries, of_keys, like, axis: int) -> Bool[Array, "_ _"]:
    """The pairs of a tile that are visible; queries lie along `axis`. Integers are in shared memory."""
    layouts = (ACROSS, DOWN)
    of_query = lambda row: spread(plgpu.load(of_queries, (row,), layout=layouts[axis]), like, axis)
    of_key = lambda row: spread(plgpu.load(of_keys, (row,), layout=layouts[1 - axis]), like, 1 - axis)
    order, hidden = of_key(0), of_key(1)
    return (order >= of_query(0)) & (hidden >= of_query(1)) & (order <= of_query(2))


def mask(entry, score, of_queries, of_keys, axis: int):
    """-inf where a pair is not visible; a tile that is visible throughout is left alone."""
    return jax.lax.cond(
        entry & MASKED != 0,
        lambda score: jnp.where(is_visible(of_queries, of_keys, score, axis), score, -jnp.inf),
        lambda score: score, score)


def _forward_kernel(entries, turns, query_integers, key_integers, query, key, value, out, logsum, *,
                    queries, keys, values, of_queries, of_keys, sums, queries_here, keys_here, values_here,
                    keys_done, values_done, handover):
    pack, turn, head = (jax.lax.axis_index(name) for name in GRID)
    me, slots, heads = jax.lax.axis_index("warpgroup"), keys.shape[0], jax.lax.axis_size("head")
    tile, start, count = (turns[pack, i, turn] for i in range(3))
    entry_of = lambda step: entries[pack, 0, start + step]

    @pl.when(me == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(COPYING, action="decrease")
        of_head = jax.lax.div(pack * heads + head, query.shape[0] // key.shape[0])
        place = lambda step: pl.ds(key_tile(entry_of(step)) * TILE, TILE)

        def copy_keys(step, slot):
            plgpu.copy_gmem_to_smem(key.at[of_head, place(step)], keys.at[slot], keys_here.at[slot])
            plgpu.copy_gmem_to_smem(key_integers.at[pack, pl.ds(0, 2), place(step)], of_keys.at[slot],
                                    keys_here.at[slot])

        def copy_values(step, slot):
            plgpu.copy_gmem_to_smem(value.at[of_head, place(step)], values.at[slot], values_here.at[slot])
        feed(count, slots, (keys_done, copy_keys), (values_done, copy_values))

    @pl.when(me < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        place = pl.ds(tile * TILE + me * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(query.at[pack * heads + head, place], queries.at[me], queries_here.at[me])
        plgpu.copy_gmem_to_smem(query_integers.at[pack, pl.ds(0, 4), place], of_queries.at[me],
                                queries_here.at[me])
        plgpu.barrier_wait(queries_here.at[me])
        softmax = _Softmax(queries.at[me], of_queries.at[me], keys, values, of_keys, keys_here, values_here,
                           keys_done, values_done, handover)
        mixed, logarithm = softmax.run(me, count, entry_of)
        queries[me], sums[me] = mixed.astype(out.dtype), logarithm
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries.at[me], out.at[pack * heads + head, place])
        plgpu.copy_smem_to_gmem(sums.at[me], logsum.at[pack * heads + head, place])
        plgpu.wait_smem_to_gmem(0)


class _Softmax(NamedTuple):
    """The walk of a warpgroup over the keys of its 64 queries; all memory is shared memory."""

    queries: Array
    of_queries: Array
    keys: Array
    values: Array
    of_keys: Array
    keys_here: Array
    values_here: Array
    keys_done: Array
    values_done: Array
    handover: Array

    def run(self, me, count, entry_of):
        """Output [64, H] and logarithm of the sum of weights [64]."""
        size = self.queries.shape[1]
        begin = (fill((ROWS, size), 0.0, plgpu.Layout.WGMMA), fill((ROWS,), -jnp.inf, ACROSS),
                 fill((ROWS,), 0.0, ACROSS))
        pl.when(me == 1)(self.hand_over)    # half a step behind, from here on
        mixed, top, total = jax.lax.fori_loop(
            0, count, lambda step, carry: self.visit(step, entry_of(step), *carry), begin)
        pl.when(me == 0)(self.hand_over)
        total = jnp.where(total > 0, total, 1.0)
        return (mixed * spread(1 / total, mixed, 0), (_or_zero(top) + jnp.log2(total)) * (1 / LOG2E))

    def visit(self, step, entry, mixed, top, total):
        slot = jax.lax.rem(step, self.keys.shape[0])
        plgpu.barrier_wait(self.keys_here.at[slot])
        score = multiply(self.queries, plgpu.transpose_ref(self.keys.at[slot], (1, 0)), (ROWS, TILE),
                         self.hand_over)
        score = mask(entry, score, self.of_queries, self.of_keys.at[slot], axis=0)
        plgpu.barrier_arrive(self.keys_done.at[slot])
        best = jnp.maximum(top, score.max(axis=1) * LOG2E)
        base = _or_zero(best)    # where nothing was visible yet, every weight must be 0
        rest, weight = jnp.exp2(top - base), jnp.exp2(score * LOG2E - spread(base, score, 0))
        mixed, total = mixed * spread(rest, mixed, 0), total * rest + weight.sum(axis=1)
        weight = weight.astype(self.values.dtype)
        mixed, total, best, weight = jax.lax.optimization_barrier((mixed, total, best, weight))
        plgpu.barrier_arrive(self.handover)
        plgpu.barrier_wait(self.values_here.at[slot])
        plgpu.barrier_wait(self.handover)
        mixed = add_product(mixed, weight, self.values.at[slot])
        plgpu.barrier_arrive(self.values_done.at[slot])
        return mixed, best, total

    def hand_over(self):
        """The tensor cores go to the other warpgroup, and its exponentials come here."""
        plgpu.barrier_arrive(self.handover)
        plgpu.barrier_wait(self.handover)


def _or_zero(top):
    return jnp.where(top > -jnp.inf, top, 0.0)
