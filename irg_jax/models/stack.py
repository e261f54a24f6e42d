"""The only file that knows how layers are stacked and scanned."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `num` equal layers as one module whose parameters have a leading axis `layers`."""
    layers = jax.vmap(make_layer)(rngs.split(num))
    for _, variable in nnx.iter_graph(layers):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return layers


def run_stack(step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]], layers: nnx.Module, carry: Any,
              per_layer: Any = None, *, remat: bool = False) -> tuple[Any, Any]:
    """Scans `step(layer, carry, slice of per_layer) -> (carry, output)` over the layers.

    `step` must not return parameters: a scan body that does stacks a second copy of all weights.
    With `remat` the backward pass recomputes each layer from its input.
    """
    def body(carry, xs):
        return step(xs[0], carry, xs[1])
    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, carry, (layers, per_layer))
