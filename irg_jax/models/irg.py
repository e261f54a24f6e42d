"""The whole: embed each stream, run the decoder once, read text logits and flow velocity.

Axes: B packs, T text tokens, V ViT patches, P values of a patch, G latent tokens, Z values of a latent token,
C latent channels, D width.
Source: `Bagel` of BAGEL's modeling/bagel/bagel.py; one forward serves training, prefill, decode and denoise.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.batch import Rows
from irg_jax.models.autoencoder import Autoencoder
from irg_jax.models.config import ModelConfig
from irg_jax.models.decoder import Decoder, KeyValue, Past
from irg_jax.models.layers import Linear, TimestepEmbedding, lookup, param, sincos_table
from irg_jax.models.streams import Streams
from irg_jax.models.vision import Connector, VisionEncoder


def normalize_pixels(pixels: UInt8[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """uint8 grey levels -> [-1, 1]: (x / 255 - 0.5) / 0.5 in float32, then `dtype`."""
    return ((pixels.astype(jnp.float32) / 255 - 0.5) / 0.5).astype(dtype)


def pack_latent(latent: Float[Array, "B h w C"], patch: int) -> Float[Array, "B G Z"]:
    """A latent image as tokens, row by row; values of a token in (row, column, channel) order."""
    return rearrange(latent, "b (h p) (w q) z -> b (h w) (p q z)", p=patch, q=patch)


def unpack_latent(tokens: Float[Array, "B G Z"], height: int, patch: int) -> Float[Array, "B h w C"]:
    """The inverse of `pack_latent`; `height` counts tokens."""
    return rearrange(tokens, "b (h w) (p q z) -> b (h p) (w q) z", h=height, p=patch, q=patch)


class IRG(nnx.Module):
    """Trainable network (the frozen autoencoder stands beside it). Compute dtype is given at each entrance."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        llm, width = config.llm, config.llm.hidden_size
        self.config = config
        self.embed = param(rngs, (llm.vocab_size, width), ("vocab", "embed"), 0.02)
        self.decoder = Decoder(llm, rngs=rngs)
        self.lm_head = Linear(width, llm.vocab_size, ("embed", "vocab"), use_bias=False, rngs=rngs)
        self.vit = VisionEncoder(config.vit, config.num_vit_layers, config.vit_max_num_patch_per_side,
                                 rngs=rngs)
        self.connector = Connector(config.vit.hidden_size, width, rngs=rngs)
        self.vae2llm = Linear(config.latent_channels, width, (None, "embed"), rngs=rngs)
        self.llm2vae = Linear(width, config.latent_channels, ("embed", None), rngs=rngs)
        self.time_embedder = TimestepEmbedding(width, rngs=rngs)

    def embed_text(self, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return lookup(self.embed[...], ids, ("vocab", "embed"), dtype)

    def embed_vit(self, patches: Float[Array, "B V P"], position: Int[Array, "B V"], rows: Rows, *,
                  remat: str = "none") -> Float[Array, "B V D"]:
        """Patches in [-1, 1] -> SigLIP -> connector, plus the fixed position table."""
        hidden = self.connector(self.vit(patches, position, rows, remat=remat))
        table = sincos_table(self.config.vit_max_num_patch_per_side, self.config.llm.hidden_size)
        return hidden + jnp.asarray(table, hidden.dtype)[position]

    def embed_latent(self, latent: Float[Array, "B G Z"], t: Float[Array, "B G"],
                     position: Int[Array, "B G"]) -> Float[Array, "B G D"]:
        """Latent tokens at time t in [0, 1] (0 for clean ones), plus the fixed position table."""
        hidden = self.vae2llm(latent) + self.time_embedder(t, latent.dtype)
        table = sincos_table(self.config.max_latent_size, self.config.llm.hidden_size)
        return hidden + jnp.asarray(table, hidden.dtype)[position]

    def __call__(self, embedded: Streams, rows: Streams, pasts: Sequence[Past] = (), *, keep: bool = False,
                 remat: str = "none", norm: bool = True) -> tuple[Streams, KeyValue | None]:
        """See `Decoder`: embedded streams and their rows, after `pasts` if given."""
        return self.decoder(embedded, rows, pasts, keep=keep, remat=remat, norm=norm)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Float32 logits of the text stream."""
        return self.lm_head(hidden).astype(jnp.float32)

    def velocity(self, hidden: Float[Array, "B G D"]) -> Float[Array, "B G Z"]:
        """Float32 flow velocity (noise minus image) of the latent stream."""
        return self.llm2vae(hidden).astype(jnp.float32)


def make_autoencoder(config: ModelConfig, *, rngs: nnx.Rngs) -> Autoencoder:
    return Autoencoder(config.vae, rngs=rngs)
