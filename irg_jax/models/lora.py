"""LoRA: beside a kernel that stays, a product of two thin ones that trains (Hu et al., arXiv 2106.09685).

y = x kernel + (alpha / rank) (x lora_a) lora_b, for every `Linear` of the groups that are adapted. `lora_b`
starts as zeros, so the first step is the checkpoint's. An adapted group trains in its adapters alone: its
kernels, biases and norms stay, and so need no gradient, no moments and no average.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from irg_jax.models.functional import Params
from irg_jax.models.groups import GROUPS, group_of
from irg_jax.models.layers import Linear, constant, param

ADAPTERS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """`groups` are names of `GROUPS`; none: no adapters."""

    groups: tuple[str, ...] = ()
    rank: int = 16
    alpha: float = 16.0    # a product counts alpha / rank times

    def __post_init__(self):
        known = [name for name in GROUPS if name != "embeddings"]    # two tables: looked up, and of every token
        if unknown := [name for name in self.groups if name not in known]:
            raise ValueError(f"lora.groups names {', '.join(map(repr, unknown))}; use {', '.join(known)}")
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.rank is {self.rank} and lora.alpha {self.alpha}; both must be positive")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def read_lora(values: Any) -> LoraConfig:
    """Of untrusted JSON. Raises: ValueError if it is not what `dataclasses.asdict` made."""
    match values:
        case {"groups": [*groups], "rank": int(rank), "alpha": int(alpha) | float(alpha), **more} if not more:
            return LoraConfig(tuple(map(str, groups)), rank, float(alpha))
    raise ValueError(f"lora is {values!r}; it must have groups, a rank and an alpha")


def is_adapter(path: str) -> bool:
    return path.rpartition(".")[2] in ADAPTERS


def adapt(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Gives adapters to the `Linear`s of the adapted groups, stacked ones included; returns the model."""
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, Linear) or group_of(".".join(map(str, path))) not in config.groups:
            continue
        *layers, d_in, d_out = module.kernel.shape
        *names, axis_in, axis_out = module.kernel.get_metadata("axes")
        module.lora_a = param(rngs, (*layers, d_in, config.rank), (*names, axis_in, None), 1 / math.sqrt(d_in))
        module.lora_b = constant((*layers, config.rank, d_out), (*names, None, axis_out), 0.0)
        module.lora_scale = config.scale
    return model


def add_shapes(shapes: Params, config: LoraConfig, path: str = "") -> Params:
    """The tree of ShapeDtypeStruct of a network -> that of the adapted one; every device has all adapters."""
    below = f"{path}." if path else ""
    tree = {name: add_shapes(child, config, below + name) if isinstance(child, dict) else child
            for name, child in shapes.items()}
    if "kernel" in tree and group_of(path) in config.groups:
        kernel = tree["kernel"]
        *layers, d_in, d_out = kernel.shape
        where = kernel.sharding
        where = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
        of = lambda *shape: jax.ShapeDtypeStruct((*layers, *shape), jnp.float32, sharding=where)
        tree |= {"lora_a": of(d_in, config.rank), "lora_b": of(config.rank, d_out)}
    return tree


def merge(params: Params, config: LoraConfig) -> Params:
    """The adapted network's parameters -> the network's: products are added to their kernels, in float32.

    Beside both there is one layer of one kernel.
    """
    tree = {name: merge(child, config) if isinstance(child, dict) else child
            for name, child in params.items() if name not in ADAPTERS}
    if "lora_a" in params:
        tree["kernel"] = _add_product(params["kernel"], params["lora_a"], params["lora_b"], config.scale)
    return tree


@functools.partial(jax.jit, static_argnums=3)
def _add_product(kernel: Float[Array, "*layers i o"], lora_a: Float[Array, "*layers i r"],
                 lora_b: Float[Array, "*layers r o"], scale: float) -> Float[Array, "*layers i o"]:
    def add(layer: tuple[Array, Array, Array]) -> Array:
        kernel, lora_a, lora_b = layer
        product = jnp.matmul(lora_a, lora_b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
    return jax.lax.map(add, (kernel, lora_a, lora_b)) if kernel.ndim == 3 else add((kernel, lora_a, lora_b))
