"""Kernels in eight bits, with one float32 scale an output column: half of what a token reads, less exact.

For drawing and writing alone. Matmuls stay in the dtype of what comes in, and the scale is applied after: a
kernel is widened where it is multiplied. Quantised are the `Linear`s of the decoder's layers, 13 of the 14.6
billion parameters; embeddings, the head and what is small stay as they are. Rounding is qwix's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from irg_jax.models.functional import Params
from irg_jax.models.groups import is_below
from irg_jax.models.layers import Linear, constant

DTYPES = ("int8", "float8_e4m3fn")
_WHERE = "decoder.layers"


def quantize(model: nnx.Module, dtype: str) -> nnx.Module:
    """The model with room for quantised kernels and their scales; returns it."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, Linear) and is_below(".".join(map(str, path)), _WHERE):
            kernel, axes = module.kernel, module.kernel.get_metadata("axes")
            module.kernel_scale = constant((*kernel.shape[:-2], kernel.shape[-1]), (*axes[:-2], axes[-1]), 1.0)
            module.kernel = nnx.Param(jnp.zeros(kernel.shape, dtype), axes=axes)
    return model


def find_dtype(params: Params) -> str | None:
    """What the kernels of a network are quantised to, None if they are not."""
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params.get("decoder"))}
    return next((dtype for dtype in DTYPES if dtype in dtypes), None)


def quantize_params(params: Params, shardings: Params, dtype: str, path: str = "") -> Params:
    """The network's parameters with kernels that are quantised where they belong, one after the other."""
    below = f"{path}." if path else ""
    tree = {name: quantize_params(child, shardings[name], dtype, below + name) if isinstance(child, dict)
            else child for name, child in params.items()}
    if "kernel" in tree and is_below(path, _WHERE):
        kernel = jax.device_put(tree["kernel"], shardings["kernel"])
        tree["kernel"], tree["kernel_scale"] = _round(kernel, dtype)
    return tree


def is_quantized(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf, by its path of keys, is a rounded kernel or its scale: those keep their dtype."""
    return path[-1].key == "kernel_scale" or str(leaf.dtype) in DTYPES


@functools.partial(jax.jit, static_argnames="dtype")
def _round(kernel: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """kernel [..., D, F] -> rounded [..., D, F], scale float32 [..., F]."""
    leading = tuple(range(kernel.ndim - 2))
    found: Any = qwix.quantize(kernel.astype(jnp.float32), jnp.dtype(dtype),
                               channelwise_axes=(*leading, kernel.ndim - 1))
    return found.qvalue, jnp.squeeze(found.scale, -2)
