"""What the sampling tests share: a model small enough to compile in a second, and its tokenizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_cases import WORDS
from data_pipelines.config import ImageTransform
from data_pipelines.tokenizer import train_tokenizer
from irg_jax.checkpoints.model import Model
from irg_jax.models.config import LLMConfig, ModelConfig, ViTConfig, VAEConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.sampling import programs
from irg_jax.sampling.cache import Context, append_text, predict_velocity
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig

CONFIG = ModelConfig(
    LLMConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2),
    ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4),
    max_latent_size=8, vit_max_num_patch_per_side=8)
SETTINGS = SamplingConfig(
    turn1=FlowConfig(num_timesteps=5), turn2=FlowConfig(num_timesteps=5, cfg_img_scale=2.0,
                                                        cfg_interval=(0.0, 1.0),
                                                        cfg_renorm_type="text_channel"),
    text=TextConfig(max_length=10, temperature=1.0), height=32, width=48, system_prompt="plan",
    vae_transform=ImageTransform(16, 64, 16), vit_transform=ImageTransform(14, 56, 14),
    dtype="float32", text_multiple=8, cache_multiple=32)


@functools.cache
def make_model(seed: int = 0) -> Model:
    """Random weights; the output layers are scaled up so that tokens and pixels differ clearly."""
    network = Functional(lambda rngs: IRG(CONFIG, rngs=rngs))
    coder = Functional(lambda rngs: make_autoencoder(CONFIG, rngs=rngs))
    params, vae = network.init(seed), coder.init(seed)
    params["lm_head"]["kernel"] *= 8
    params["embed"] *= 20
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, vocab_size=CONFIG.llm.vocab_size)
    to_host = lambda tree: jax.tree.map(np.asarray, tree)
    return Model(CONFIG, tokenizer, to_host(params), to_host(vae))


@functools.cache
def bound(seed: int = 0) -> IRG:
    return programs.network(CONFIG).bind(jax.tree.map(jnp.asarray, make_model(seed).params))


@functools.cache
def _compiled(function):
    return jax.jit(lambda *arguments: function(bound(), *arguments))


def append(context: Context, tokens, lengths) -> tuple[Context, jax.Array]:
    """`cache.append_text` of the small model."""
    return _compiled(append_text)(context, tokens, lengths)


def predict(context: Context, brackets, latent, t, position) -> jax.Array:
    """`cache.predict_velocity` of the small model."""
    return _compiled(predict_velocity)(context, brackets, latent, t, position)


def distance(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
