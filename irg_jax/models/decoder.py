"""The decoder: two experts a layer over three streams, one attention for all.

Axes: B packs, S tokens of a stream, C cached tokens, L layers, D width, N heads, K key-value heads, H head
size.
Source: `Qwen2MoTDecoderLayer` of BAGEL's modeling/bagel/qwen2_navit.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from data_pipelines.batch import Rows
from irg_jax.kernels.attention import Sight
from irg_jax.models.config import LLMConfig
from irg_jax.models.joint import KeyValue, attend_together, look_together
from irg_jax.models.layers import Linear, RMSNorm, rotary_angles, rotate
from irg_jax.models.stack import run_stack, stack
from irg_jax.models.streams import Streams, join


class Past(NamedTuple):
    """What a context already holds; gaps and padding have order INF in `rows` [B, C]."""

    kv: KeyValue
    rows: Rows


class Expert(nnx.Module):
    """All weights of a layer but the attention itself, which has none."""

    def __init__(self, config: LLMConfig, *, rngs: nnx.Rngs):
        width, inner, size, eps = (config.hidden_size, config.intermediate_size, config.head_dim,
                                   config.rms_norm_eps)
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.head_dim = size
        self.input_norm = RMSNorm(width, ("norm",), eps=eps)
        self.q = Linear(width, queries, ("embed", "heads"), rngs=rngs)
        self.k = Linear(width, keys, ("embed", "kv_heads"), rngs=rngs)
        self.v = Linear(width, keys, ("embed", "kv_heads"), rngs=rngs)
        self.o = Linear(queries, width, ("heads", "embed"), use_bias=False, rngs=rngs)
        self.q_norm = RMSNorm(size, (None,), eps=eps)
        self.k_norm = RMSNorm(size, (None,), eps=eps)
        self.post_norm = RMSNorm(width, ("norm",), eps=eps)
        self.gate = Linear(width, inner, ("embed", "mlp"), use_bias=False, rngs=rngs)
        self.up = Linear(width, inner, ("embed", "mlp"), use_bias=False, rngs=rngs)
        self.down = Linear(inner, width, ("mlp", "embed"), use_bias=False, rngs=rngs)

    def project(self, x: Float[Array, "B S D"], angles) -> tuple[Array, Array, Array]:
        """Normed and rotated queries [B S N H] and keys, values [B S K H]."""
        x = self.input_norm(x)
        heads = lambda y: y.reshape(*y.shape[:2], y.shape[2] // self.head_dim, self.head_dim)
        query = rotate(self.q_norm(heads(self.q(x))), angles)
        key = rotate(self.k_norm(heads(self.k(x))), angles)
        return query, key, heads(self.v(x))

    def finish(self, x: Float[Array, "B S D"], attended: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
        """Output projection, residual, MLP, residual."""
        x = x + self.o(attended.reshape(*attended.shape[:2], attended.shape[2] * attended.shape[3]))
        y = self.post_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Layer(nnx.Module):
    """Each token is computed by exactly one expert; all attend together."""

    def __init__(self, config: LLMConfig, *, rngs: nnx.Rngs):
        self.und = Expert(config, rngs=rngs)
        self.gen = Expert(config, rngs=rngs)

    def __call__(self, x: Streams, past: KeyValue | None, angles: Streams, sight: Sight
                 ) -> tuple[Streams, KeyValue]:
        experts = (self.und, self.und, self.gen)
        projected = [expert.project(h, angle) for expert, h, angle in zip(experts, x, angles)]
        query, key, value = zip(*projected)
        attended = attend_together(query, key, value, sight, past, heads="heads")
        x = Streams(*(expert.finish(h, a) for expert, h, a in zip(experts, x, attended)))
        return x, KeyValue.of(join(key), join(value))


class Decoder(nnx.Module):
    """The stack of layers and the two final norms."""

    def __init__(self, config: LLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = stack(lambda r: Layer(config, rngs=r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, ("norm",), eps=config.rms_norm_eps)
        self.norm_gen = RMSNorm(config.hidden_size, ("norm",), eps=config.rms_norm_eps)

    def __call__(self, x: Streams, rows: Streams, past: Past | None = None, *, keep: bool = False,
                 remat: str = "none") -> tuple[Streams, KeyValue | None]:
        """Streams of embeddings [B S D] and of `Rows` -> normed hidden states and, if `keep`, new keys.

        New keys and values are [L, B, K, T + V + G, H], in stream order, for the caller to append.
        """
        config = self.config
        angles = Streams(*(rotary_angles(r.rope, config.head_dim, config.rope_theta) for r in rows))
        sight = look_together(rows, None if past is None else past.rows)

        def step(layer, x, kv):
            x, new = layer(x, kv, angles, sight)
            return x, new if keep else None
        x, new = run_stack(step, self.layers, x, None if past is None else past.kv, remat=remat)
        return Streams(self.norm(x.text), self.norm(x.vit), self.norm_gen(x.latent)), new
