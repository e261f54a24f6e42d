"""Attention of streams that are split over packs, heads and tokens is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attention_cases import random_rows
from data_pipelines.batch import Rows
from irg_jax.kernels import hopper
from irg_jax.models import joint
from irg_jax.models.joint import KeyValue, attend_together, look_together
from irg_jax.models.layers import lookup, matmul
from irg_jax.parallel.collectives import find_collectives, total_by_kind
from irg_jax.parallel.hlo import Module
from irg_jax.parallel.sharding import BATCH_AXES, MeshConfig, make_mesh
from irg_jax.parallel.shards import Axes, per_shard

LENGTHS, PAST, HEADS, KEY_HEADS = (8, 12, 20), 6, 6, 2


def draw(seed: int):
    """Queries, keys, values, cotangents, rows (each three streams) and a past, in no order of time."""
    rng = np.random.default_rng(seed)
    whole = PAST + sum(LENGTHS)
    shuffled = rng.permutation(whole)
    rows = Rows(*(row[:, shuffled] for row in random_rows(rng, 2, whole)))
    streams = lambda x: tuple(np.split(x[:, PAST:], np.cumsum(LENGTHS)[:-1], axis=1))
    heads = lambda count: streams(rng.normal(size=(2, whole, count, 8)).astype(np.float32))
    past = KeyValue(*rng.normal(size=(2, 2, KEY_HEADS, PAST, 8)).astype(np.float32))
    return ((heads(HEADS), heads(KEY_HEADS), heads(KEY_HEADS), heads(HEADS), tuple(map(lambda x: Rows(*x), zip(
        *map(streams, rows))))), past, Rows(*(row[:, :PAST] for row in rows)))


def attend_and_back(query, key, value, weight, rows, past, past_rows):
    sight = look_together(rows, past_rows)
    out, back = jax.vjp(lambda *heads: attend_together(*heads, sight, past, heads="heads"), query, key, value)
    return out, back(weight)


@pytest.mark.slow
def test_streams_that_begin_on_a_tile_see_the_same(monkeypatch):
    """Padding between the streams, as packs of several tiles have it, changes nothing."""
    split, *past = jax.tree.map(jnp.asarray, draw(seed=5))
    wanted = attend_and_back(*split, *past)
    monkeypatch.setattr(joint, "TILE", 7)
    assert look_together(split[4]).query.order.shape[1] == 14 + 14 + 21
    got = attend_and_back(*split, *past)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("config", [MeshConfig(fsdp=2, tensor=2, context=2), MeshConfig(data=2, context=4)],
                         ids=str)
def test_any_mesh(config, with_past):
    split, past, past_rows = draw(seed=4)
    rest = (past, past_rows) if with_past else (None, None)
    wanted = jax.jit(attend_and_back)(*split, *rest)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        split = jax.device_put(split, NamedSharding(mesh, P(BATCH_AXES, "context")))
        got = jax.jit(attend_and_back)(*split, *rest)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_empty_stream_passes_by_what_each_device_does():
    """jaxlib 0.11.2 crashes where one passes through."""
    streams = (jnp.arange(12.0).reshape(4, 3), jnp.zeros((4, 0)), jnp.ones((4, 2, 0), jnp.int32))
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        doubled = per_shard(lambda streams: tuple(2 * x for x in streams), (Axes("packs"),), Axes("packs"))
        out = jax.jit(doubled)(streams)
        [each] = [one for one in jax.make_jaxpr(doubled)(streams).eqns if one.primitive.name == "shard_map"]
    assert [x.aval.shape for x in (*each.invars, *each.outvars)] == [(4, 3), (4, 3)]
    for one, stream in zip(out, streams, strict=True):
        assert (one.shape, one.dtype) == (stream.shape, stream.dtype)
        np.testing.assert_array_equal(one, 2 * stream)


def test_the_work_for_hopper_gpus_is_each_devices_own(monkeypatch):
    split, *_ = draw(seed=4)
    wanted = jax.jit(attend_and_back)(*split, None, None)
    monkeypatch.setattr(hopper, "is_present", lambda: True)
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *split: attend_and_back(*split, None, None))(*split)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_keys_are_gathered_and_their_gradients_scattered():
    split, *_ = draw(seed=4)
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    with jax.set_mesh(mesh):
        split = jax.device_put(split, NamedSharding(mesh, P(BATCH_AXES, "context")))
        program = jax.jit(attend_and_back).lower(*split, None, None).compile().as_text()
    assert program.count(" reduce-scatter(") == 2
    assert not any(program.count(f" {name}(") for name in ("all-reduce", "all-to-all", "collective-permute"))


def test_parameters_are_gathered_once_and_what_they_meet_stays():
    """A table of words that is split many ways; a kernel that two streams meet, forwards and backwards."""
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    place = lambda *axes: NamedSharding(mesh, P(*axes))
    shape = lambda sizes, dtype, *axes: jax.ShapeDtypeStruct(sizes, dtype, sharding=place(*axes))
    table = shape((48, 32), jnp.float32, None, ("fsdp", "context"))
    kernel = shape((32, 16), jnp.float32, ("fsdp", "context"), "tensor")
    ids = shape((8, 64), jnp.int32, BATCH_AXES, "context")
    streams = [shape((8, length, 32), jnp.float32, BATCH_AXES, "context") for length in (64, 128)]

    def gathered(function, *arguments) -> float:
        with jax.set_mesh(mesh):
            text = jax.jit(function).lower(*arguments).compile().as_text()
        return total_by_kind(find_collectives(Module(text), mesh.size))["all-gather"]
    words = lambda table, ids: lookup(table, ids, ("vocab", "embed"), jnp.float32)
    assert gathered(words, table, ids) == 4 * 48 * 32 * 7 / 8    # what is looked up has 64 KiB
    loss = lambda kernel, *streams: sum(jnp.sum(matmul(x, kernel, ("embed", "mlp"))**2) for x in streams)
    assert gathered(jax.grad(loss, (0, 1, 2)), kernel, *streams) == 4 * 32 * 16 * 7 / 8
