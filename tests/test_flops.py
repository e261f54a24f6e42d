"""Operations of traced programs, against the compiler's count and counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from irg_jax.parallel.flops import Flops, count_flops

ROWS, WIDTH, LAYERS = 64, 128, 3
ONE = 2.0 * ROWS * WIDTH * WIDTH   # a layer's matmul


def trace(function, *arguments):
    return jax.make_jaxpr(function)(*arguments)


def test_an_unrolled_model_counts_as_the_compiler_counts_it():
    """Matmuls, attention and a convolution, forward and backward; elementwise work is all that differs."""
    def loss(weights, x):
        for w in weights["linear"]:
            x = jnp.tanh(x @ w)
        score = jax.nn.softmax(jnp.einsum("bsd,btd->bst", x, x))
        x = jnp.einsum("bst,btd->bsd", score, x)
        image = jax.lax.conv_general_dilated(x[:, :, None], weights["conv"], (1, 1), "VALID",
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(image**2)
    weights = {"linear": [jnp.ones((WIDTH, WIDTH))] * LAYERS, "conv": jnp.ones((4, 1, WIDTH, 32))}
    gradient, x = jax.value_and_grad(loss), jnp.ones((2, 96, WIDTH))
    ours = count_flops(trace(gradient, weights, x))
    theirs = jax.jit(gradient).lower(weights, x).compile().cost_analysis()["flops"]
    assert ours.conv > 0 and 0.95 < ours.total / theirs < 1.02


@pytest.mark.parametrize("remat, matmuls", [(False, 3), (True, 4)])
def test_scan_remat_and_gradient_by_hand(remat, matmuls):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    layer = jax.checkpoint(layer) if remat else layer
    loss = lambda w, x: jnp.sum(jax.lax.scan(layer, x, w)[0]**2)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = trace(gradient, jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH)))
    assert count_flops(program) == Flops(dot=LAYERS * matmuls * ONE)


def test_batched_and_nested_loops():
    def outer(x, _):
        return jax.lax.map(lambda row: row @ jnp.ones((WIDTH, WIDTH)), x), None
    program = trace(lambda x: jax.lax.scan(outer, x, length=5)[0], jnp.ones((2, ROWS, WIDTH)))
    assert count_flops(program).dot == 5 * 2 * ONE


def test_a_cond_counts_as_its_dearest_branch():
    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))
    program = trace(lambda flag: jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w), True)
    assert count_flops(program).dot == 2 * ONE


def test_what_depends_on_the_platform_counts_as_the_platforms_branch():
    def loss(x, w):
        return jnp.sum(jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w, default=lambda x, w: x @ w @ w))
    program = trace(jax.value_and_grad(loss), jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH)))
    assert count_flops(program).dot == 2 * ONE    # forwards, and backwards to x
    assert count_flops(program, platform="cpu").dot == 4 * ONE


def test_a_while_that_multiplies_is_refused_and_another_is_not():
    square = jnp.ones((8, 8))
    with pytest.raises(ValueError, match="use lax.scan"):
        count_flops(trace(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), square))
    counting = trace(lambda: jax.lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0))
    assert count_flops(counting) == Flops()


def kernel(x, flops=None):
    def copy(source, target):
        target[...] = source[...]
    estimate = None if flops is None else pl.CostEstimate(flops=flops, bytes_accessed=0, transcendentals=0)
    return pl.pallas_call(copy, jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate,
                          interpret=True)(x)


def test_a_kernel_counts_as_it_says_times_the_share_it_visits():
    program = trace(lambda x: jax.lax.scan(lambda x, _: (kernel(x, 1000), None), x, length=4)[0], jnp.ones(8))
    assert count_flops(program, visited_ratio=0.25) == Flops(kernel=1000.0)
    with pytest.raises(ValueError, match="cost_estimate"):
        count_flops(trace(kernel, jnp.ones(8)))


def test_what_every_device_does_counts_for_each():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    dealt = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    program = trace(dealt, jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH)))
    assert count_flops(program).dot == 2 * ONE   # dealt four ways, done twice
