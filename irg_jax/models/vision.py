"""SigLIP2 encoder over packed patches, and the connector into the language model.

Axes: B packs, V patches, P patch * patch * 3, D ViT width, N heads, H head size, E language-model width.
Source: BAGEL's modeling/bagel/siglip_navit.py (no RoPE, attention inside each image, last layer dropped).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from data_pipelines.batch import Rows
from irg_jax.kernels.attention import Sight
from irg_jax.models.config import ViTConfig
from irg_jax.models.joint import attend_together, look_together
from irg_jax.models.layers import LayerNorm, Linear, lookup, param
from irg_jax.models.stack import run_stack, stack


def own_images(rows: Rows) -> Rows:
    """Rows by which a patch sees its own image and nothing else: its "sample" is its block."""
    return rows._replace(first=jnp.where(rows.last < 0, rows.first, rows.span),
                         noised=jnp.zeros_like(rows.noised))


class ViTLayer(nnx.Module):
    """Pre-norm attention and MLP. Widths are axes of their own: 1152 and 4304 do not divide by 256."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.norm1 = LayerNorm(width, ("norm",), eps=config.layer_norm_eps)
        self.norm2 = LayerNorm(width, ("norm",), eps=config.layer_norm_eps)
        self.q = Linear(width, width, ("vit_embed", None), rngs=rngs)
        self.k = Linear(width, width, ("vit_embed", None), rngs=rngs)
        self.v = Linear(width, width, ("vit_embed", None), rngs=rngs)
        self.o = Linear(width, width, (None, "vit_embed"), rngs=rngs)
        self.fc1 = Linear(width, inner, ("vit_embed", None), rngs=rngs)
        self.fc2 = Linear(inner, width, (None, "vit_embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "B V D"], sight: Sight) -> Float[Array, "B V D"]:
        y = self.norm1(x)
        heads = lambda z: z.reshape(*z.shape[:2], self.num_heads, z.shape[2] // self.num_heads)
        query, key, value = ((heads(project(y)),) for project in (self.q, self.k, self.v))
        attended, = attend_together(query, key, value, sight)
        x = x + self.o(attended.reshape(*x.shape))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))


class VisionEncoder(nnx.Module):
    """Patches -> hidden states after the post layer norm."""

    def __init__(self, config: ViTConfig, num_layers: int, side: int, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.patch_embed = Linear(config.patch_size**2 * config.num_channels, width,
                                  (None, "vit_embed"), rngs=rngs)
        self.position = param(rngs, (side * side, width), (None, "vit_embed"), 0.02)
        self.layers = stack(lambda r: ViTLayer(config, rngs=r), num_layers, rngs)
        self.post_norm = LayerNorm(width, ("norm",), eps=config.layer_norm_eps)

    def __call__(self, patches: Float[Array, "B V P"], position: Int[Array, "B V"], rows: Rows, *,
                 remat: str = "none") -> Float[Array, "B V D"]:
        """`rows` are the ViT stream's rows in the pack; only `order`, `span` and `last` matter here."""
        x = self.patch_embed(patches) + lookup(self.position[...], position, (None, "vit_embed"), patches.dtype)
        sight = look_together((own_images(rows),))
        x, _ = run_stack(lambda layer, x, _: (layer(x, sight), None), self.layers, x, remat=remat)
        return self.post_norm(x)


class Connector(nnx.Module):
    """Two linears with tanh-GELU from ViT width to language-model width."""

    def __init__(self, width: int, d_model: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, d_model, (None, "embed"), rngs=rngs)
        self.fc2 = Linear(d_model, d_model, ("embed", None), rngs=rngs)

    def __call__(self, x: Float[Array, "B V D"]) -> Float[Array, "B V E"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))
