"""What the model has read so far: keys and values of a batch of contexts, appended block by block.

A block is a text between its two brackets, or one image between its two. All contexts of a batch
take a block at the same offset and the same padded length; what a shorter one leaves empty is a gap
of order INF that nobody sees. So ragged batches, empty contexts and the contexts of guidance are
one case, and every shape is static.

Axes: B contexts, C capacity, T text tokens of a block, V patches, G latent tokens, S any of these,
L layers, K key-value heads, H head size, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.batch import INF, Rows, padding_rows
from irg_jax.models.config import ModelConfig
from irg_jax.models.decoder import KeyValue, Past
from irg_jax.models.irg import IRG, normalize_pixels
from irg_jax.models.streams import Streams, join_rows


class Context(NamedTuple):
    """B contexts of capacity C; the model computes in the dtype of `kv`."""

    kv: KeyValue                   # [L, B, K, C, H] each
    rows: Rows                     # [B, C] each
    next_order: Int[Array, "B"]    # of the next token
    next_rope: Int[Array, "B"]     # position id of the next block
    length: Int[Array, ""] | int   # slots in use, gaps counted: where the next block goes

    @property
    def capacity(self) -> int:
        return self.rows.order.shape[1]


class Part(NamedTuple):
    """One stream of a block: embedded tokens [B, S, D] and their rows [B, S]."""

    embedded: Float[Array, "B S D"]
    rows: Rows


def make_empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Context:
    """Contexts that hold nothing."""
    llm = config.llm
    shape = (llm.num_hidden_layers, batch, llm.num_key_value_heads, capacity, llm.head_dim)
    zeros = jnp.zeros((batch,), jnp.int32)
    rows = jax.tree.map(jnp.asarray, padding_rows((batch, capacity)))
    kv = KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return Context(kv, rows, zeros, zeros, 0)


def enlarge(context: Context, capacity: int) -> Context:
    """The same contexts with room for `capacity` tokens; they are never made smaller."""
    batch, old = context.rows.order.shape
    if capacity <= old:
        return context
    pad = ((0, 0), (0, 0), (0, 0), (0, capacity - old), (0, 0))
    rows = zip(context.rows, padding_rows((batch, capacity - old)))
    return context._replace(kv=KeyValue(*(jnp.pad(part, pad) for part in context.kv)),
                            rows=Rows(*(jnp.concatenate(pair, axis=1) for pair in rows)))


def repeat(context: Context, batch: int) -> Context:
    """One context (B = 1) as the common start of `batch` contexts."""
    kv, rest = context.kv, (context.rows, context.next_order, context.next_rope)
    rest = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), rest)
    return Context(KeyValue(*(jnp.repeat(x, batch, axis=1) for x in kv)), *rest, context.length)


def append_text(model: IRG, context: Context, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
                ) -> tuple[Context, Float[Array, "B T D"]]:
    """Reads a text, its brackets among `tokens`; of each row the first `lengths` count.

    Returns the contexts after it, and the hidden states of the text.
    """
    place = jnp.arange(tokens.shape[1])
    valid = place < lengths[:, None]
    order = context.next_order[:, None] + place
    rows = Rows(order=jnp.where(valid, order, INF), first=jnp.where(valid, 0, INF), span=order,
                last=jnp.where(valid, order, -1), noised=jnp.zeros_like(valid),
                rope=context.next_rope[:, None] + place)
    text = Part(model.embed_text(tokens, context.kv.key.dtype), rows)
    context, hidden = _append(model, context, text)
    return context._replace(next_order=context.next_order + lengths,
                            next_rope=context.next_rope + lengths), hidden.text


def append_vit(model: IRG, context: Context, brackets: Int[Array, "2"],
               patches: UInt8[Array, "B V P*P*3"], position: Int[Array, "V"]) -> Context:
    """Reads an image through the ViT; `brackets` are the ids of its two brackets."""
    outside, inside = image_rows(context, patches.shape[1])
    position = jnp.broadcast_to(position, patches.shape[:2])
    pixels = normalize_pixels(patches, context.kv.key.dtype)
    return _append_image(model, context, _bracket_part(model, context, brackets, outside),
                         vit=Part(model.embed_vit(pixels, position, inside), inside))


def append_latent(model: IRG, context: Context, brackets: Int[Array, "2"],
                  latent: Float[Array, "B G P*P*Z"], position: Int[Array, "G"]) -> Context:
    """Reads a finished image as clean latents (t = 0); they are scaled, as `pack_latent` gives."""
    outside, inside = image_rows(context, latent.shape[1])
    return _append_image(model, context, _bracket_part(model, context, brackets, outside),
                         latent=_latent_part(model, context, latent, 0.0, position, inside))


def predict_velocity(model: IRG, context: Context, brackets: Int[Array, "2"],
                     latent: Float[Array, "B G P*P*Z"], t: Float[Array, ""],
                     position: Int[Array, "G"]) -> Float[Array, "B G P*P*Z"]:
    """Flow velocity at time t of a noised image after the contexts, which it never enters."""
    outside, inside = image_rows(context, latent.shape[1], noised=True)
    streams, rows = _stream(_bracket_part(model, context, brackets, outside),
                            latent=_latent_part(model, context, latent, t, position, inside))
    hidden, _ = model(streams, rows, Past(context.kv, context.rows))
    return model.velocity(hidden.latent)


def image_rows(context: Context, num_tokens: int, *, noised: bool = False) -> tuple[Rows, Rows]:
    """Rows of the next image block: of its two brackets [B, 2], and inside them [B, num_tokens].

    All of a block see each other and share one position id.
    """
    start = context.next_order[:, None]
    last = start + num_tokens + 1

    def make(order):
        same = lambda value: jnp.broadcast_to(value, order.shape)
        return Rows(order, same(0), same(start), same(last), same(noised),
                    same(context.next_rope[:, None]))
    return make(jnp.concatenate([start, last], axis=1)), make(start + 1 + jnp.arange(num_tokens))


def _bracket_part(model, context, brackets, rows: Rows) -> Part:
    ids = jnp.broadcast_to(brackets, rows.order.shape)
    return Part(model.embed_text(ids, context.kv.key.dtype), rows)


def _latent_part(model, context, latent, t, position, rows: Rows) -> Part:
    latent, shape = latent.astype(context.kv.key.dtype), latent.shape[:2]
    time = jnp.full(shape, t, jnp.float32)
    return Part(model.embed_latent(latent, time, jnp.broadcast_to(position, shape)), rows)


def _append_image(model, context: Context, outside: Part, **inside: Part) -> Context:
    context, _ = _append(model, context, outside, **inside)
    (part,) = inside.values()
    return context._replace(next_order=context.next_order + part.embedded.shape[1] + 2,
                            next_rope=context.next_rope + 1)


def _append(model, context: Context, text: Part, **inside: Part) -> tuple[Context, Streams]:
    """Runs a block and writes its keys and values at `length`."""
    streams, rows = _stream(text, **inside)
    hidden, new = model(streams, rows, Past(context.kv, context.rows), keep=True)
    write = lambda axis: lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), context.length, axis)
    new_rows = join_rows(rows)
    return context._replace(kv=jax.tree.map(write(3), context.kv, new),
                            rows=jax.tree.map(write(1), context.rows, new_rows),
                            length=context.length + new_rows.order.shape[1]), hidden


def _stream(text: Part, *, vit: Part | None = None, latent: Part | None = None
            ) -> tuple[Streams, Streams]:
    """Parts as the model's streams and their rows; what is not there has length 0."""
    none = jax.tree.map(lambda x: x[:, :0], text)
    parts = (text, vit or none, latent or none)
    return Streams(*(part.embedded for part in parts)), Streams(*(part.rows for part in parts))
