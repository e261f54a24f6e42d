"""Attention and matmul against dense float64 ones: values and gradients, over random rows and any blocks."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import dense, gradients, random_rows
from data_pipelines.batch import Rows
from irg_jax.kernels import blockwise
from irg_jax.kernels.attention import attend, look
from irg_jax.models.layers import matmul


CASES = given(seed=st.integers(0, 10**6), length=st.integers(1, 21), past=st.integers(0, 9),
              shared=st.integers(1, 3), block=st.sampled_from((4, 7, 512)),
              scores=st.sampled_from((1, 400, 2**20)))


@settings(deadline=None, max_examples=2)    # each is compiled
@CASES
def test_attention_is_the_dense_definition(seed, length, past, shared, block, scores):
    check(seed, length, past, shared, block, scores)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@CASES
def test_attention_is_the_dense_definition_in_any_shape(seed, length, past, shared, block, scores):
    check(seed, length, past, shared, block, scores)


def check(seed, length, past, shared, block, scores):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 3, past + length)
    query_rows = Rows(*(row[:, past:] for row in rows))
    normal = lambda *shape: rng.normal(size=shape) * 2
    inputs = normal(3, length, 2 * shared, 6), normal(3, past + length, 2, 6), normal(3, past + length, 2, 6)
    weight = normal(3, length, 2 * shared, 6)
    with jax.enable_x64(True):
        wanted = gradients(lambda *xs: dense(*xs, query_rows, rows), inputs, weight)
    with mock.patch.multiple(blockwise, BLOCK=block, SCORES=scores):
        singles = [np.float32(x) for x in inputs]
        got = gradients(lambda *xs: attend(*xs, look(query_rows, rows), "xla"), singles, np.float32(weight))
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


def test_bfloat16_stays_near_and_padding_gets_zeros():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 3, 40)
    rows.last[0] = -1
    query, key, value, weight = (rng.normal(size=(3, 40, heads, 16)) for heads in (4, 2, 2, 4))
    wanted = gradients(lambda *xs: dense(*xs, rows, rows), map(np.float32, (query, key, value)), weight)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    got = gradients(lambda *xs: attend(*xs, look(rows, rows), "xla"), halves, weight)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for one, other in zip(got, wanted):
        assert np.abs(np.float32(one) - other).max() < 0.03 * np.abs(other).max()
    assert not np.float32(got[0])[rows.last < 0].any() and all(np.isfinite(np.float32(x)).all() for x in got)


def test_memory_of_the_gradient_is_linear_in_queries():
    """Four times the queries and keys need less than five times the memory, not sixteen."""
    def memory(length):
        rows = Rows(*(jax.ShapeDtypeStruct((1, length), np.bool_ if name == "noised" else np.int32)
                      for name in Rows._fields))
        heads = [jax.ShapeDtypeStruct((1, length, count, 16), np.float32) for count in (2, 1, 1)]
        loss = lambda query, key, value, rows: attend(query, key, value, look(rows, rows), "xla").sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*heads, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    assert memory(8192) < 5 * memory(2048)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 0, 5)])
def test_matmul_has_the_gradient_that_jax_gives(shape):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    weight = rng.normal(size=(*shape[:-1], 4)).astype(np.float32)
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    ours = lambda x, kernel: matmul(jnp.asarray(x), jnp.asarray(kernel), (None, None))
    for one, other in zip(gradients(ours, (x, kernel), weight), gradients(jnp.matmul, (x, kernel), weight)):
        check(one, other)
