"""The fused kernel, interpreted, against the dense float64 definition; its tiles; its compilation for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from attention_cases import dense, gradients, on_tpus, one_image, padding, random_rows
from data_pipelines.batch import Rows, visible
from irg_jax.kernels import tiles, tpu
from irg_jax.kernels.attention import MAX_HEAD, attend, look
from irg_jax.models.config import LLMConfig
from irg_jax.models.decoder import Decoder
from irg_jax.models.functional import Functional
from irg_jax.models.streams import Streams
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.training.planned import count_pairs

PAST, LENGTH, TILE = 13, 45, 8    # neither is a multiple of the tile
HEADS, SHARED, SIZE = 2, 3, 6


@functools.cache
def kernel():
    """Jitted once: value and gradients of queries behind a past, by the interpreted kernel."""
    def run(query, key, value, weight, rows):
        sight = look(Rows(*(row[:, PAST:] for row in rows)), rows, TILE)
        return gradients(lambda *heads: attend(*heads, sight, "pallas"), (query, key, value), weight)
    return jax.jit(run)


def inputs(rng: np.random.Generator, dtype=np.float32):
    normal = lambda length, heads: jnp.asarray(rng.normal(size=(2, length, heads, SIZE)) * 2, dtype)
    queries = HEADS * SHARED
    return (normal(LENGTH, queries), normal(PAST + LENGTH, HEADS), normal(PAST + LENGTH, HEADS),
            normal(LENGTH, queries))


def check(rows: Rows, rng: np.random.Generator, dtype=np.float32, tolerance: float = 3e-5) -> None:
    heads = inputs(rng, dtype)
    got = kernel()(*heads, rows)
    query_rows = Rows(*(row[:, PAST:] for row in rows))
    with jax.enable_x64(True):
        doubles = [np.asarray(x, np.float64) for x in heads]
        wanted = gradients(lambda *xs: dense(*xs, query_rows, rows), doubles[:3], doubles[3])
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.float64(one), other, atol=tolerance * max(1.0, np.abs(other).max()))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_values_and_gradients_are_the_dense_ones(seed):
    rng = np.random.default_rng(seed)
    check(random_rows(rng, 2, PAST + LENGTH), rng)


@pytest.mark.parametrize("rows", [padding, one_image, functools.partial(one_image, noised=True)])
def test_packs_of_one_kind(rows):
    check(rows(2, PAST + LENGTH), np.random.default_rng(0))


def test_bfloat16_stays_near():
    rng = np.random.default_rng(3)
    check(random_rows(rng, 2, PAST + LENGTH), rng, jnp.bfloat16, tolerance=0.02)


def test_keys_whose_gradients_do_not_fit_take_several_walks(monkeypatch):
    rng = np.random.default_rng(2)
    rows, heads = random_rows(rng, 2, PAST + LENGTH), inputs(rng)
    wanted = kernel()(*heads, rows)
    monkeypatch.setattr(tpu, "SUMS", 8 * SIZE * (2 * TILE + 3))    # two tiles of eight at a time
    for one, other in zip(kernel.__wrapped__()(*heads, rows), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), tile=st.sampled_from((4, 8, 16)))
def test_the_map_never_skips_or_bares_a_pair(seed, tile):
    rng = np.random.default_rng(seed)
    key = tiles.pad_rows(random_rows(rng, 2, 70), tile)
    query = tiles.pad_rows(Rows(*(row[:, 5:] for row in key)), tile)
    seen = np.asarray(visible(query, key))
    seen = seen.reshape(2, seen.shape[1] // tile, tile, -1, tile).swapaxes(2, 3)
    visited, full = map(np.asarray, jax.jit(tiles.map_tiles, static_argnums=2)(query, key, tile))
    assert (visited >= seen.any((-1, -2))).all()
    assert (full <= seen.all((-1, -2))).all()
    assert (full >= (seen.all((-1, -2)) & visited)).mean() > 0.9   # and is not always masked


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6))
def test_the_benchmark_counts_count_pairs(seed):
    rows = random_rows(np.random.default_rng(seed), 1, 60)
    assert count_pairs(Rows(*(row[0] for row in rows))) == visible(rows, rows).sum()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(((1, 1), (1, 6), (6, 1), (5, 4))),
       share=st.floats(0, 1))
def test_the_list_has_every_tile_once_and_ends_every_row(seed, shape, share):
    rng = np.random.default_rng(seed)
    visited = rng.random((2, *shape)) < share
    full = visited & (rng.random(visited.shape) < 0.5)
    lists, counts = map(np.asarray, jax.jit(tiles.list_work)(visited, full))
    for entries, count, want, bare in zip(lists, counts[:, 0], visited, full):
        rows = tiles.query_tile(entries), tiles.key_tile(entries)
        real = entries[:count] & tiles.EMPTY == 0
        assert list(zip(*(row[:count][real] for row in rows))) == list(zip(*np.nonzero(want)))
        assert ((entries[:count][real] & tiles.MASKED == 0) == bare[want]).all()
        for mark in (tiles.FIRST, tiles.LAST):   # each row of tiles begins once and ends once
            assert (rows[0][entries & mark != 0] == np.arange(shape[0])).all()
        assert (entries[count:] & 15 == tiles.EMPTY).all()
        assert all((row[count:] == row[count - 1]).all() for row in rows)


def test_more_tiles_than_the_list_can_name():
    many = jax.ShapeDtypeStruct((1, tiles.MAX_TILES + 1, 1), bool)
    with pytest.raises(ValueError, match="8193 x 1 tiles"):
        jax.eval_shape(tiles.list_work, many, many)


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_no_races(call):
    """The simulator of TPU memory looks at every copy and every store of a kernel."""
    rng = np.random.default_rng(1)
    rows = tiles.pad_rows(random_rows(rng, 1, 40), TILE)
    sight = look(rows, rows, TILE)
    length = rows.order.shape[1]
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    query, key, value = normal(1, 2, 3, length, SIZE), normal(1, 2, length, SIZE), normal(1, 2, length, SIZE)
    more = (query, normal(1, 2, 3, length), normal(1, 2, 3, length)) if call == "backward" else ()
    interpret = pltpu.InterpretParams(detect_races=True)
    run = functools.partial(getattr(tpu, call), tile=TILE)
    checked = run(query, key, value, *more, sight.work, interpret=interpret)
    plain = run(query, key, value, *more, sight.work, interpret=True)
    for one, other in zip(checked, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    assert not interpret_pallas_call.races.races_found


def lowered(platform: str, implementation: str, queries: int = 300, size: int = 64) -> str:
    """The program that `attend` becomes for a platform that need not be here."""
    rows = Rows(*(jax.ShapeDtypeStruct((1, queries), np.bool_ if name == "noised" else np.int32)
                  for name in Rows._fields))
    heads = [jax.ShapeDtypeStruct((1, queries, count, size), jnp.bfloat16) for count in (4, 2, 2)]
    loss = lambda query, key, value, rows: attend(query, key, value, look(rows, rows), implementation).sum()
    with on_tpus(MeshConfig(fsdp=1)):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*heads, rows)
        return program.lower(lowering_platforms=(platform,)).as_text()


def test_auto_takes_the_kernel_on_a_tpu_alone():
    for platform, calls in (("tpu", 2), ("cpu", 0), ("cuda", 0)):
        assert lowered(platform, "auto").count("@tpu_custom_call") == calls
    assert "tpu_custom_call" not in lowered("tpu", "xla")
    assert "tpu_custom_call" not in lowered("tpu", "auto", queries=3)
    assert "tpu_custom_call" not in lowered("tpu", "auto", size=MAX_HEAD * 2)


@pytest.mark.parametrize("remat, calls", [("none", 2), ("attention", 2), ("full", 3)])
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MeshConfig(fsdp=2, context=2)], ids=str)
def test_remat_runs_attention_again_only_if_asked(mesh, remat, calls):
    """Forwards, backwards and, where layers are computed again in full, forwards once more."""
    decoder = Functional(lambda rngs: Decoder(LLMConfig(100, 64, 64, 2, 4, 2), rngs=rngs))
    shape = lambda dtype, *more: jax.ShapeDtypeStruct((4, 300, *more), dtype)
    rows = Rows(*(shape(np.bool_ if name == "noised" else np.int32) for name in Rows._fields))

    def loss(params, x, rows):
        hidden, _ = decoder.bind(params)(Streams(x, x, x), Streams(rows, rows, rows), remat=remat)
        return hidden.text.sum()
    with on_tpus(mesh):
        program = jax.jit(jax.grad(loss)).trace(decoder.shapes, shape(jnp.float32, 64), rows)
        assert program.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == calls


def test_an_unknown_implementation():
    rows, heads = padding(1, 4), jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="'cudnn'; choose one of auto, pallas, xla"):
        attend(heads, heads, heads, look(rows, rows), "cudnn")
