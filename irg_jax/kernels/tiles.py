"""Which tiles of keys a tile of queries must visit, and which of them need masking.

Axes: B packs, S queries, C keys, Q and K tiles of them, W entries of the work list, 8 rows of integers.

The visibility rule as three comparisons: a query sees a key if

    first <= order <= last   and   hidden >= span,      hidden = order of a noised key, INF of any other

so the least and greatest of five integers tell of a whole tile whether none of its pairs is visible (skip it)
or all are (no masking). What is left is written down as one list, in order of queries, made on the device once
a pack and shared by all layers; the grid of a kernel runs over it, so a skipped tile costs nothing at all.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from data_pipelines.batch import INF, Rows

# An entry of the work list: 13 bits the tile of queries, 13 bits the tile of keys, and four marks.
FIRST, LAST, MASKED, EMPTY = 1, 2, 4, 8
_MARKS, _TILE = 4, 13
MAX_TILES = 1 << _TILE
_PADDING = Rows(INF, INF, 0, -1, False, 0)


def query_integers(rows: Rows) -> Int[Array, "B 8 S"]:
    """first, span, last; then nothing, for a TPU takes rows by eights."""
    return _eight(rows.first, jnp.where(rows.last < 0, INF, rows.span), rows.last)


def key_integers(rows: Rows) -> Int[Array, "B 8 C"]:
    """order, hidden; then nothing. A padding key has order INF, which is after every `last`."""
    return _eight(rows.order, jnp.where(rows.noised, rows.order, INF))


def _eight(*rows) -> Int[Array, "B 8 S"]:
    return jnp.stack(rows + (jnp.zeros_like(rows[0]),) * (8 - len(rows)), axis=1)


def pad_axis(x: Any, axis: int, multiple: int, value: Any = 0) -> Array:
    """With `value` behind, up to a multiple of the tile."""
    return jnp.pad(x, [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)],
                   constant_values=value)


def pad_rows(rows: Rows, multiple: int) -> Rows:
    """Padding behind the rows, up to a multiple of the tile."""
    return Rows(*(pad_axis(row, 1, multiple, value) for row, value in zip(rows, _PADDING)))


def map_tiles(query: Rows, key: Rows, tile: int) -> tuple[Bool[Array, "B Q K"], Bool[Array, "B Q K"]]:
    """Tiles with a visible pair, and those of them that are visible throughout.

    The first may err towards visiting and the second towards masking, never the other way. Lengths are
    multiples of `tile`.
    """
    cut = lambda row: row.reshape(row.shape[0], row.shape[1] // tile, tile)
    of_queries = lambda least, row: getattr(cut(row), least)(-1)[:, :, None]
    of_keys = lambda least, row: getattr(cut(row), least)(-1)[:, None, :]
    span = jnp.where(query.last < 0, INF, query.span)
    hidden = jnp.where(key.noised, key.order, INF)
    # Padding must not make a tile that is skipped seem wide; with it, no tile is full.
    without_padding = lambda row: jnp.where(key.order < INF, row, -1)
    visited = ((of_keys("max", without_padding(key.order)) >= of_queries("min", query.first))
               & (of_keys("min", key.order) <= of_queries("max", query.last))
               & (of_keys("max", without_padding(hidden)) >= of_queries("min", span)))
    full = ((of_keys("min", key.order) >= of_queries("max", query.first))
            & (of_keys("max", key.order) <= of_queries("min", query.last))
            & (of_keys("min", hidden) >= of_queries("max", span)))
    return visited, visited & full


def list_work(visited: Bool[Array, "B Q K"], full: Bool[Array, "B Q K"]
              ) -> tuple[Int[Array, "B W"], Int[Array, "B 1"]]:
    """int32 entries in order of queries, W = Q K, and how many of them are real.

    Every tile of queries has at least one, so that its result is written: without a key to visit it is EMPTY.
    Entries past the count repeat the last one's tiles and have no mark but EMPTY: no copies and no work.
    Raises: ValueError if there are more tiles than an entry can name.
    """
    packs, queries, keys = visited.shape
    if max(queries, keys) > MAX_TILES:
        raise ValueError(f"{queries} x {keys} tiles of queries and keys; an entry can name {MAX_TILES} of "
                         "each: take larger tiles, or split the pack over `context`")
    if not queries:    # a stream without tokens
        return jnp.zeros((packs, 0), jnp.int32), jnp.zeros((packs, 1), jnp.int32)
    empty = ~visited.any(-1, keepdims=True)
    listed = visited | (empty & (jnp.arange(keys) == 0))
    tiles = jnp.arange(queries)[:, None] << (_MARKS + _TILE) | jnp.arange(keys) << _MARKS
    place = jnp.cumsum(listed, -1)
    marks = (jnp.where(place == 1, FIRST, 0) | jnp.where(place == place[..., -1:], LAST, 0)
             | jnp.where(full, 0, MASKED) | jnp.where(empty, EMPTY, 0))
    flat = lambda x: x.reshape(x.shape[0], -1)
    listed, entries = flat(listed), flat(tiles | marks)
    count = listed.sum(-1, keepdims=True, dtype=jnp.int32)
    entries = jnp.take_along_axis(entries, jnp.argsort(~listed, axis=-1, stable=True), axis=-1)
    last = jnp.take_along_axis(entries, count - 1, axis=-1)
    idle = last >> _MARKS << _MARKS | EMPTY
    return jnp.where(jnp.arange(entries.shape[1]) < count, entries, idle).astype(jnp.int32), count


class Turns(NamedTuple):
    """A list of work for programs that take one row of tiles each, whichever comes first.

    `turns` holds the row, its first entry and how many it has (0 if it is EMPTY), the longest row first:
    what is left for the last programs is short.
    """

    entries: Int[Array, "B 1 W"]
    turns: Int[Array, "B 3 Q"]


def take_turns(visited: Bool[Array, "B Q K"], full: Bool[Array, "B Q K"]) -> Turns:
    """The same list, with where each row begins. Of the transposed map, rows are tiles of keys."""
    entries, _ = list_work(visited, full)
    count = visited.sum(-1, dtype=jnp.int32)
    start = jnp.cumsum(jnp.maximum(count, 1), -1) - jnp.maximum(count, 1)
    row = jnp.argsort(-count, axis=-1)
    pick = lambda x: jnp.take_along_axis(x, row, axis=-1)
    return Turns(entries[:, None], jnp.stack([row, pick(start), pick(count)], 1).astype(jnp.int32))


def query_tile(entry):
    return entry >> (_MARKS + _TILE)


def key_tile(entry):
    return entry >> _MARKS & ((1 << _TILE) - 1)


def pick_keys(entries: Int[Array, "B W"], start: int, count: int) -> Int[Array, "B W"]:
    """The list for `count` tiles of keys from `start` alone, which are 0 to `count` then; others are EMPTY."""
    tile = key_tile(entries) - start
    kept = (tile >= 0) & (tile < count)
    other = entries - (key_tile(entries) << _MARKS)
    return jnp.where(kept, other | tile << _MARKS, other | EMPTY)
