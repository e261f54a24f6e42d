"""Small parts shared by the networks.

Axes: B packs, S tokens, D width, F output width, N heads, H head size.
A parameter carries `axes`, the logical names of its dimensions; `parallel/sharding.py` maps those to a mesh.
Parameters are float32; a layer computes in the dtype of its input, norms in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from irg_jax.parallel.shards import deal, is_split, whole

Axes = tuple[str | None, ...]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, stddev: float) -> nnx.Param:
    """A normally distributed parameter with logical axis names."""
    value = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def constant(shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
    """A parameter that starts as one value, with logical axis names."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def lookup(table: Float[Array, "rows D"], index: Int[Array, "B S"], axes: Axes, dtype: DTypeLike
           ) -> Float[Array, "B S D"]:
    """Rows of a table in `dtype`; `axes` are the table's."""
    return deal(whole(table.astype(dtype), axes)[index])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "... D"], kernel: Num[Array, "D F"], axes: Axes) -> Float[Array, "... F"]:
    """x kernel in the dtype of x; `axes` are the kernel's.

    The gradient of the kernel is (x^T dy); JAX's own is (dy^T x)^T. On CPUs the latter writes all of dy once
    more, transposed: once a quarter of the miniature's step (docs/performance.md).
    """
    return deal(x @ whole(kernel.astype(x.dtype), axes))


def _matmul_backward(axes, saved, d_y):
    x, kernel = saved
    # Said again, and not saved: whole kernels of all layers would fill a chip.
    d_x = deal(d_y @ whole(kernel.astype(x.dtype), axes).T)
    if is_split("tokens"):    # packs and tokens, both split, do not merge without being gathered
        leading = tuple(range(x.ndim - 1))
        d_kernel = jax.lax.dot_general(x, d_y, ((leading, leading), ((), ())))
    else:                     # on a CPU a copy of x less
        rows = lambda x: x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        d_kernel = rows(x).T @ rows(d_y)
    return d_x, d_kernel.astype(kernel.dtype)


matmul.defvjp(lambda x, kernel, axes: (matmul(x, kernel, axes), (x, kernel)), _matmul_backward)


class Linear(nnx.Module):
    """y = x kernel + bias, in the dtype of x; `lora` and `quantized` may put more beside the kernel."""

    def __init__(self, d_in: int, d_out: int, axes: Axes, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.axes = axes
        self.kernel = param(rngs, (d_in, d_out), axes, 1 / math.sqrt(d_in))
        self.bias = constant((d_out,), axes[1:], 0.0) if use_bias else None
        self.lora_a, self.lora_b, self.lora_scale = nnx.data(None), nnx.data(None), 1.0
        self.kernel_scale = nnx.data(None)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        y = matmul(x, self.kernel[...], self.axes)
        if self.kernel_scale is not None:
            y = (y * self.kernel_scale[...]).astype(x.dtype)
        if self.lora_a is not None:
            thin = matmul(x, self.lora_a[...], (self.axes[0], None))
            y = y + self.lora_scale * matmul(thin, self.lora_b[...], (None, self.axes[1]))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, width: int, axes: Axes, *, eps: float):
        self.scale = constant((width,), axes, 1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Zero mean, unit variance, scale and bias over the last axis, computed in float32."""

    def __init__(self, width: int, axes: Axes, *, eps: float):
        self.scale = constant((width,), axes, 1.0)
        self.bias = constant((width,), axes, 0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def rotary_angles(
    position: Int[Array, "B S"], head_dim: int, theta: float
) -> tuple[Float[Array, "B S 1 F"], Float[Array, "B S 1 F"]]:
    """Cosine and sine of RoPE in float32: bf16 would round position 257 to 256."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B S N H"], angles: tuple[Float[Array, "B S 1 F"], Float[Array, "B S 1 F"]]
) -> Float[Array, "B S N H"]:
    """Turns the pairs (x[i], x[i + H/2]) by the angles, in float32 (Qwen2's half-split layout)."""
    cos, sin = angles
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def sincos_table(side: int, width: int) -> Float[np.ndarray, "positions width"]:
    """Fixed 2-D position table: row r * side + c holds [sin c, cos c, sin r, cos r] at width/4 speeds.

    Written from the formula (ViT's 2-D sine-cosine embedding, columns first); float64 until the end.
    """
    speed = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    angle = np.arange(side, dtype=np.float64)[:, None] * speed
    wave = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    rows, columns = np.divmod(np.arange(side * side), side)
    return np.concatenate([wave[columns], wave[rows]], axis=1).astype(np.float32)


class TimestepEmbedding(nnx.Module):
    """t in [0, 1] -> 256 cosines and sines -> two linears with SiLU. Source: `TimestepEmbedder` of BAGEL."""

    NUM_FREQUENCIES = 128

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(2 * self.NUM_FREQUENCIES, width, (None, "embed"), rngs=rngs)
        self.fc2 = Linear(width, width, ("embed", None), rngs=rngs)

    def __call__(self, t: Float[Array, "B G"], dtype: DTypeLike) -> Float[Array, "B G D"]:
        count = self.NUM_FREQUENCIES
        frequency = jnp.exp(-math.log(10000.0) * jnp.arange(count, dtype=jnp.float32) / count)
        angle = t.astype(jnp.float32)[..., None] * frequency
        wave = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        return self.fc2(jax.nn.silu(self.fc1(wave.astype(dtype))))
