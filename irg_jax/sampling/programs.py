"""The compiled programs a trajectory is made of; each reads its weights as an argument.

They belong to the module, not to a generator, so models of one geometry share what was compiled.
Axes: B contexts, H and W pixels, G latent tokens, V patches.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import IRG, make_autoencoder, normalize_pixels, pack_latent, unpack_latent
from irg_jax.sampling import cache
from irg_jax.sampling.cache import Context
from irg_jax.sampling.config import FlowConfig, TextConfig
from irg_jax.sampling.flow import Branches, draw_latent
from irg_jax.sampling.text import Written, write_text


class Weights(NamedTuple):
    """Parameters of the network and of the autoencoder."""

    model: Params
    vae: Params


@functools.cache
def network(config: ModelConfig) -> Functional:
    return Functional(lambda rngs: IRG(config, rngs=rngs))


@functools.cache
def autoencoder(config: ModelConfig) -> Functional:
    return Functional(lambda rngs: make_autoencoder(config, rngs=rngs))


def _compiled(*static: str) -> Callable:
    return functools.partial(jax.jit, static_argnames=("config", *static))


@_compiled()
def read_text(weights: Weights, context: Context, tokens: Int[Array, "B T"],
              lengths: Int[Array, "B"], *, config: ModelConfig) -> Context:
    """See `cache.append_text`."""
    return cache.append_text(_model(weights, config), context, tokens, lengths)[0]


@_compiled("bos", "eos", "settings", "want_logits")
def write(weights: Weights, context: Context, keys: Key[Array, "B"], *, config: ModelConfig,
          bos: int, eos: int, settings: TextConfig, want_logits: bool = False) -> Written:
    """See `text.write_text`."""
    return write_text(_model(weights, config), context, keys, bos=bos, eos=eos, config=settings,
                      want_logits=want_logits)


@_compiled("settings")
def draw(weights: Weights, branches: Branches, noise: Float[Array, "B G P*P*Z"],
         position: Int[Array, "G"], brackets: Int[Array, "2"], *, config: ModelConfig,
         settings: FlowConfig) -> Float[Array, "B G P*P*Z"]:
    """See `flow.draw_latent`."""
    return draw_latent(_model(weights, config), branches, noise, position, brackets, settings)


@_compiled()
def read_patches(weights: Weights, context: Context, patches: UInt8[Array, "B V P*P*3"],
                 position: Int[Array, "V"], brackets: Int[Array, "2"], *,
                 config: ModelConfig) -> Context:
    """See `cache.append_vit`."""
    return cache.append_vit(_model(weights, config), context, brackets, patches, position)


@_compiled()
def read_image(weights: Weights, context: Context, images: UInt8[Array, "B H W 3"],
               keys: Key[Array, "B"] | None, position: Int[Array, "G"],
               brackets: Int[Array, "2"], *, config: ModelConfig) -> Context:
    """Encodes images and reads them as clean latents; with `keys` the posterior is sampled."""
    vae = autoencoder(config).bind(weights.vae)
    latent, logvar = vae.encode(normalize_pixels(images, context.kv.key.dtype))
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.normal(key, latent.shape[1:], latent.dtype))(keys)
        latent = latent + jnp.exp(0.5 * logvar) * noise
    tokens = pack_latent(vae.scale(latent), config.latent_patch_size)
    return cache.append_latent(_model(weights, config), context, brackets, tokens, position)


@_compiled("height")
def decode(weights: Weights, latent: Float[Array, "B G P*P*Z"], *, config: ModelConfig,
           height: int) -> UInt8[Array, "B H W 3"]:
    """Latent tokens to grey levels, rounded down as the original does; `height` counts tokens."""
    dtype = jax.tree.leaves(weights.vae)[0].dtype
    image = unpack_latent(latent.astype(dtype), height, config.latent_patch_size)
    pixels = autoencoder(config).bind(weights.vae).decode(image).astype(jnp.float32)
    return (jnp.clip(pixels * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _model(weights: Weights, config: ModelConfig) -> IRG:
    return network(config).bind(weights.model)
