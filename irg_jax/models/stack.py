"""The only file that knows how layers are stacked and scanned."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from irg_jax.kernels.attention import ATTENDED

REMAT = {
    "none": None,                                                            # nothing: all is kept
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),    # all but what attention gave
    "full": None,                                                            # all: only inputs are kept
}


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `num` equal layers as one module whose parameters have a leading axis `layers`."""
    layers = jax.vmap(make_layer)(rngs.split(num))
    for _, variable in nnx.iter_graph(layers):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return layers


def run_stack(step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]], layers: nnx.Module, carry: Any,
              per_layer: Any = None, *, remat: str = "none") -> tuple[Any, Any]:
    """Scans `step(layer, carry, slice of per_layer) -> (carry, output)` over the layers.

    `step` must not return parameters: a scan body that does stacks a second copy of all weights.
    `remat` is one of `REMAT`: what the backward pass of a layer computes again from its input.
    """
    def body(carry, xs):
        return step(xs[0], carry, xs[1])
    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
    return jax.lax.scan(body, carry, (layers, per_layer))
