"""The compiled programs a trajectory is made of; each reads its weights as an argument.

They belong to the module, not to a generator, so models of one geometry share what was compiled.
Axes: B contexts, H and W pixels, G latent tokens, V patches.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt8

from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import pick
from irg_jax.models.irg import IRG, make_autoencoder, normalize_pixels, pack_latent, unpack_latent
from irg_jax.models.quantized import find_dtype, is_quantized, quantize, quantize_params
from irg_jax.parallel.sharding import param_shardings, replicated
from irg_jax.sampling import cache
from irg_jax.sampling.cache import Context
from irg_jax.sampling.config import FlowConfig
from irg_jax.sampling.flow import Branches, draw_latent
from irg_jax.sampling.text import Writing, write_on


class Weights(NamedTuple):
    """Parameters of the network and of the autoencoder."""

    model: Params
    vae: Params


@functools.cache
def network(config: ModelConfig, quantized: str | None = None) -> Functional:
    """Args: quantized is one of `quantized.DTYPES`."""
    if quantized is None:
        return Functional(lambda rngs: IRG(config, rngs=rngs))
    return Functional(lambda rngs: quantize(IRG(config, rngs=rngs), quantized))


@functools.cache
def autoencoder(config: ModelConfig) -> Functional:
    return Functional(lambda rngs: make_autoencoder(config, rngs=rngs))


def place(params: Params, vae: Params, config: ModelConfig, dtype: DTypeLike, mesh: Mesh, *,
          quantized: str | None = None) -> Weights:
    """Weights in the dtype that is computed in, or quantised, on the devices of a mesh."""
    def put(path, x, where):
        return jax.device_put(x if x.dtype == dtype or is_quantized(path, x) else x.astype(dtype), where)

    def where(params):
        return param_shardings(pick(network(config, find_dtype(params)).axes, params), params, mesh)
    if quantized is not None:
        params = quantize_params(params, where(params), quantized)
    everywhere = jax.tree.map(lambda x: replicated(mesh), vae)
    return Weights(*(jax.tree_util.tree_map_with_path(put, *each)
                     for each in ((params, where(params)), (vae, everywhere))))


def _compiled(*static: str) -> Callable:
    return functools.partial(jax.jit, static_argnames=("config", *static))


def _growing(*static: str) -> Callable:
    """Compiles a function of weights, contexts and more that goes on with the contexts.

    Their cache is donated, and written where it lies; views of them are left as they are.
    """
    def decorate(function: Callable) -> Callable:
        @functools.partial(jax.jit, static_argnames=("config", *static), donate_argnames="kv")
        def program(weights, kv, view, *arguments, **statics):
            return function(weights, Context(kv, view), *arguments, **statics)

        @functools.wraps(function)
        def call(weights, context, *arguments, **statics):
            return program(weights, *context, *arguments, **statics)
        return call
    return decorate


@_growing()
def read_text(weights: Weights, context: Context, tokens: Int[Array, "B T"],
              lengths: Int[Array, "B"], *, config: ModelConfig) -> Context:
    """See `cache.append_text`."""
    return cache.append_text(_model(weights, config), context, tokens, lengths)[0]


@_growing("eos")
def write(weights: Weights, context: Context, writing: Writing, keys: Key[Array, "B"], *, config: ModelConfig,
          eos: int) -> tuple[Context, Writing]:
    """See `text.write_on`."""
    return write_on(_model(weights, config), context, writing, keys, eos=eos)


@_compiled("settings")
def draw(weights: Weights, branches: Branches, noise: Float[Array, "B G P*P*Z"],
         position: Int[Array, "G"], brackets: Int[Array, "2"], *, config: ModelConfig,
         settings: FlowConfig) -> Float[Array, "B G P*P*Z"]:
    """See `flow.draw_latent`."""
    return draw_latent(_model(weights, config), branches, noise, position, brackets, settings)


@_growing()
def read_patches(weights: Weights, context: Context, patches: UInt8[Array, "B V P*P*3"],
                 position: Int[Array, "V"], brackets: Int[Array, "2"], *,
                 config: ModelConfig) -> Context:
    """See `cache.append_vit`."""
    return cache.append_vit(_model(weights, config), context, brackets, patches, position)


@_growing()
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
    return network(config, find_dtype(weights.model)).bind(weights.model)
