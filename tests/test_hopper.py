"""The kernels for Hopper GPUs, interpreted, against the dense float64 definition; their lowering for CUDA."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_cases import dense, gradients, on_tpus, one_image, padding, random_rows
from data_pipelines.batch import INF, Rows
from hopper_interpreter import interpreted
from irg_jax.kernels import hopper, hopper_backward, tiles
from irg_jax.kernels.attention import attend, look
from irg_jax.parallel.sharding import MeshConfig

PAST, LENGTH, STRETCH = 40, 290, 30    # no length is a multiple of the tile


@functools.cache
def kernel(groups: int, shared: int, size: int, interpret):
    """Jitted once: value and gradients of queries behind a past, by the interpreted kernels."""
    def run(query, key, value, weight, rows):
        work = hopper.prepare(Rows(*(row[:, PAST:] for row in rows)), rows)
        out, logsum = hopper.forward(query, key, value, work, interpret=interpret)
        share = jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32), -1)
        return out, *hopper_backward.backward(query, key, value, weight, logsum, share, work,
                                              interpret=interpret)
    return jax.jit(run)


def check(rows: Rows, rng: np.random.Generator, groups: int, shared: int, size: int) -> None:
    packs, keys = rows.order.shape
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    of_queries, of_keys = (packs, groups, shared, keys - PAST, size), (packs, groups, keys, size)
    heads = normal(*of_queries) * size**-0.5, normal(*of_keys) * 2, normal(*of_keys), normal(*of_queries)
    with interpreted(detect_races=True) as interpret:
        got = jax.block_until_ready(kernel(groups, shared, size, interpret)(*heads, rows))
    query_rows = Rows(*(row[:, PAST:] for row in rows))

    def definition(query, key, value):
        query = query.reshape(packs, groups * shared, -1, size) * size**0.5
        out = dense(*(x.swapaxes(1, 2) for x in (query, key, value)), query_rows, rows)
        return out.swapaxes(1, 2).reshape(packs, groups, shared, -1, size)
    with jax.enable_x64(True):
        doubles = [np.asarray(x, np.float64) for x in heads]
        wanted = gradients(definition, doubles[:3], doubles[3])
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.float64(one), other, atol=0.02 * max(1.0, np.abs(other).max()))


def long_rows(seed: int, packs: int, length: int) -> Rows:
    """`random_rows`, each token of which is STRETCH tokens of its kind: samples of several tiles."""
    rows = random_rows(np.random.default_rng(seed), packs, -(-length // STRETCH))
    repeat = lambda row: np.repeat(row, STRETCH, axis=1)[:, :length]
    order, first, span, last, noised, rope = map(repeat, rows)
    within = np.arange(length) % STRETCH
    real, alone = last >= 0, (span == order) & (last == order)
    at = np.where(real, order, 0) * STRETCH + within
    return Rows(np.where(real, at, INF), np.where(real, first * STRETCH, INF),
                np.where(alone, at, span * STRETCH), np.where(alone & real, at, np.where(
                    real, last * STRETCH + STRETCH - 1, -1)), noised, rope)


def mixed_rows(packs: int, length: int) -> Rows:
    """A pack of long samples, some tiles of which need no mask, and one of short ones."""
    one, other = long_rows(7, 1, length), random_rows(np.random.default_rng(4), 1, length)
    return Rows(*(np.concatenate(rows) for rows in zip(one, other)))


@pytest.mark.parametrize("rows, packs, groups, shared, size", [
    pytest.param(mixed_rows, 2, 1, 2, 64, marks=pytest.mark.slow),
    (functools.partial(long_rows, 7), 1, 2, 1, 128),
    pytest.param(functools.partial(one_image, noised=True), 1, 2, 1, 128, marks=pytest.mark.slow),
    (padding, 1, 2, 1, 128),
], ids=["two packs", "heads of 128", "one image", "padding"])
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="hopper_interpreter.py extends that of jax 0.10")
def test_values_and_gradients_are_the_dense_ones(rows, packs, groups, shared, size):
    """Without a race between copies, products and the reuse of their memory."""
    check(rows(packs, PAST + LENGTH), np.random.default_rng(0), groups, shared, size)


def test_the_rows_of_these_tests_have_tiles_of_every_kind():
    rows = mixed_rows(2, PAST + LENGTH)
    turns = hopper.prepare(Rows(*(row[:, PAST:] for row in rows)), rows).by_query
    marks = np.asarray(turns.entries)
    assert ((marks & (tiles.MASKED | tiles.EMPTY)) == 0).any() and (marks & tiles.MASKED).any()
    assert np.asarray(turns.turns)[:, 2].max() > 2    # more than there are slots for heads of 128


def test_turns_find_every_row_and_take_the_longest_first():
    rng = np.random.default_rng(0)
    visited = rng.random((3, 6, 5)) < 0.4
    visited[0, 2] = False
    entries, turns = map(np.asarray, tiles.take_turns(jnp.asarray(visited), jnp.asarray(visited)))
    for pack in range(3):
        row, start, count = turns[pack]
        assert sorted(row) == list(range(6)) and (np.diff(count) <= 0).all()
        for i, first, number in zip(row, start, count):
            mine = entries[pack, 0, first:first + number]
            assert (tiles.query_tile(mine) == i).all()
            assert list(tiles.key_tile(mine)) == list(np.nonzero(visited[pack, i])[0])


@pytest.mark.parametrize("size, dtype", [(72, jnp.bfloat16), (256, jnp.bfloat16), (64, jnp.float32)])
def test_other_heads_are_refused_by_name(size, dtype):
    rows = padding(1, 130)
    query, key = jnp.zeros((1, 1, 2, 130, size), dtype), jnp.zeros((1, 1, 130, size), dtype)
    with pytest.raises(ValueError, match=f"heads are {size} {jnp.dtype(dtype)}; .* of 64 and 128 bfloat16"):
        hopper.forward(query, key, key, hopper.prepare(rows, rows))


def lowered(platform: str, length: int, size: int = 128, dtype=jnp.bfloat16, for_hopper=True) -> str:
    """The gradient of `attend` for a platform that need not be here, with heads of BAGEL."""
    rows = Rows(*(jax.ShapeDtypeStruct((1, length), np.bool_ if name == "noised" else np.int32)
                  for name in Rows._fields))
    heads = [jax.ShapeDtypeStruct((1, length, count, size), dtype) for count in (28, 4, 4)]
    sight = lambda rows: look(rows, rows, for_hopper=for_hopper)
    loss = lambda query, key, value, rows: attend(query, key, value, sight(rows)).sum()
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*heads, rows)
    return program.lower(lowering_platforms=(platform,)).as_text()


def test_a_whole_pack_lowers_for_cuda():
    assert lowered("cuda", 40_960).count("mosaic_gpu_v2") == 3


def test_auto_takes_the_kernel_on_hopper_alone():
    assert "mosaic_gpu" in lowered("cuda", 300, 64)
    assert "mosaic_gpu" not in lowered("cuda", 300, 64, for_hopper=None)   # for who knows which GPU
    assert "mosaic_gpu" not in lowered("cuda", 300, 72)
    assert "mosaic_gpu" not in lowered("cuda", 300, 64, jnp.float32)
    assert "mosaic_gpu" not in lowered("cuda", 100, 64)
    assert "mosaic_gpu" not in lowered("cpu", 300, 64)
    with on_tpus(MeshConfig(fsdp=1)):
        assert lowered("tpu", 300, 64).count("tpu_custom_call") == 2


@pytest.mark.parametrize("backend, capability, wanted", [
    ("gpu", "9.0", True), ("gpu", "8.0", False), ("gpu", "10.0", False), ("cpu", "", False)])
def test_hopper_is_known_by_its_capability(monkeypatch, backend, capability, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert hopper.is_present() == wanted
    rows = padding(1, 200)
    assert bool(look(rows, rows).on_hopper) == wanted
