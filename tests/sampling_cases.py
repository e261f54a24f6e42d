"""What the sampling tests share: a model small enough to compile in a second, and its tokenizer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_cases import WORDS
from data_pipelines.config import ImageTransform
from data_pipelines.tokenizer import train_tokenizer
from irg_jax.checkpoints.model import Model
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.irg import IRG
from irg_jax.sampling import programs
from irg_jax.sampling.cache import Context, append_text, predict_velocities
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig

CONFIG = ModelConfig(
    LLMConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2),
    ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=1),
    latent_patch_size=8, max_latent_size=8, vit_max_num_patch_per_side=8)
SETTINGS = SamplingConfig(
    turn1=FlowConfig(num_timesteps=5), turn2=FlowConfig(num_timesteps=5, cfg_img_scale=2.0,
                                                        cfg_interval=(0.0, 1.0),
                                                        cfg_renorm_type="text_channel"),
    text=TextConfig(max_length=10, temperature=1.0), height=32, width=48, system_prompt="plan",
    vae_transform=ImageTransform(16, 64, 16), vit_transform=ImageTransform(14, 56, 14),
    dtype="float32", text_multiple=8, cache_multiple=32)

# Few shapes to compile, whoever meets.
WIDE = dataclasses.replace(SETTINGS, text_multiple=32, cache_multiple=256)


@functools.cache
def make_model(seed: int = 0) -> Model:
    """Random weights; embedding and logits are large, so that tokens and texts differ clearly."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        match path[-1].key:
            case "scale":
                return 1 + 0.1 * noise
            case "bias":
                return 0.1 * noise
            case "embed":
                return noise
        fan_in = np.prod(leaf.shape[-4 if leaf.ndim == 4 else -2:-1])
        return (noise / np.sqrt(fan_in)).astype(np.float32)
    params, vae = (jax.tree_util.tree_map_with_path(draw, functional(CONFIG).shapes)
                   for functional in (programs.network, programs.autoencoder))
    params["lm_head"]["kernel"] *= 8
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, vocab_size=CONFIG.llm.vocab_size)
    return Model(CONFIG, tokenizer, params, vae)


@functools.cache
def bound(seed: int = 0) -> IRG:
    return programs.network(CONFIG).bind(jax.tree.map(jnp.asarray, make_model(seed).params))


@functools.cache
def compiled(function):
    """A function of the small model and more, as one of these alone."""
    model = bound()   # outside the trace, or its cache would keep tracers
    return jax.jit(lambda *arguments: function(model, *arguments))


def append(context: Context, tokens, lengths) -> tuple[Context, jax.Array]:
    """`cache.append_text` of the small model."""
    return compiled(append_text)(context, tokens, lengths)


def predict(context: Context, brackets, latent, t, position) -> jax.Array:
    """`cache.predict_velocities` of the small model, after all that was read."""
    return compiled(predict_velocities)([(context.kv, [context.view])], brackets, latent, t, position)[0]


def distance(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
