"""The decoder: two experts a layer over three streams, one attention for all.

Axes: B packs, S tokens of a stream, C cached tokens, L layers, D width, N heads, K key-value heads, H head
size.
Source: `Qwen2MoTDecoderLayer` of BAGEL's modeling/bagel/qwen2_navit.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from data_pipelines.batch import Rows
from irg_jax.kernels.attention import Sight
from irg_jax.models.config import LLMConfig
from irg_jax.models.joint import KeyValue, attend_together, look_together
from irg_jax.models.layers import Linear, RMSNorm, rotary_angles, rotate
from irg_jax.models.stack import run_stack, stack
from irg_jax.models.streams import Streams, join, shares


class Past(NamedTuple):
    """What was read before, as seen from one or several places.

    Each view is the rows [B, C'] of the first C' slots of the cache; gaps, padding and what this view does not
    see have order INF.
    """

    kv: KeyValue              # [L, B, K, C, H] each
    views: tuple[Rows, ...]


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

    def __call__(self, x: Streams, pasts: Sequence[KeyValue | None], angles: Streams, sights: Sequence[Sight]
                 ) -> tuple[Streams, KeyValue]:
        experts = (self.und, self.und, self.gen)
        projected = [expert.project(h, angle) for expert, h, angle in zip(experts, x, angles)]
        query, key, value = zip(*projected)
        parts = zip(*(shares(streams, len(sights)) for streams in (query, key, value)), sights, pasts,
                    strict=True)
        attended = map(join, zip(*(attend_together(*part, heads="heads") for part in parts)))
        x = Streams(*(expert.finish(h, a) for expert, h, a in zip(experts, x, attended)))
        return x, KeyValue.of(join(key), join(value))


class Decoder(nnx.Module):
    """The stack of layers and the two final norms."""

    def __init__(self, config: LLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = stack(lambda r: Layer(config, rngs=r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, ("norm",), eps=config.rms_norm_eps)
        self.norm_gen = RMSNorm(config.hidden_size, ("norm",), eps=config.rms_norm_eps)

    def __call__(self, x: Streams, rows: Streams, pasts: Sequence[Past] = (), *, keep: bool = False,
                 remat: str = "none", norm: bool = True) -> tuple[Streams, KeyValue | None]:
        """Embedded streams [B S D] and their `Rows` -> hidden states, normed if `norm`; new keys if `keep`.

        With several views of the past, each stream is as many equal shares, one behind the other: all are
        computed at once, and a share sees its view and itself. New keys and values are
        [L, B, K, T + V + G, H], in stream order, for the caller to append.
        """
        config = self.config
        angles = Streams(*(rotary_angles(r.rope, config.head_dim, config.rope_theta) for r in rows))
        views = [view for past in pasts for view in past.views] or [None]
        sights = [look_together(*each) for each in zip(shares(rows, len(views)), views)]

        def step(layer, x, caches):
            x, new = layer(x, [seen for past, kv in zip(pasts, caches) for seen in _views(past, kv)] or [None],
                           angles, sights)
            return x, new if keep else None
        x, new = run_stack(step, self.layers, x, tuple(past.kv for past in pasts), remat=remat)
        if not norm:
            return x, new
        return Streams(self.norm(x.text), self.norm(x.vit), self.norm_gen(x.latent)), new


def _views(past: Past, kv: KeyValue) -> list[KeyValue]:
    """Of one layer's cache [B, K, C, H] what each view has rows for."""
    return [KeyValue(*(x[:, :, :view.order.shape[1]] for x in kv)) for view in past.views]
