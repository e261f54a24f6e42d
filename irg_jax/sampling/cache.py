"""What the model has read so far: keys and values of a batch of contexts, appended block by block.

A block is a text between its two brackets, or one image between its two. All contexts of a batch
take a block at the same offset and the same padded length; what a shorter one leaves empty is a gap
of order INF that nobody sees. So ragged batches and empty contexts are one case, and every shape is
static. What is read is never changed: the view of an earlier moment stays good while its context
grows, so that the contexts of guidance need no cache of their own.

Axes: B contexts, C capacity, T text tokens of a block, V patches, G latent tokens, S any of these,
L layers, K key-value heads, H head size, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.batch import INF, Rows, padding_rows
from irg_jax.models.config import ModelConfig
from irg_jax.models.decoder import KeyValue, Past
from irg_jax.models.irg import IRG, normalize_pixels
from irg_jax.models.streams import Streams, join_rows
from irg_jax.parallel.sharding import BATCH_AXES, replicated

T = TypeVar("T")


class View(NamedTuple):
    """What of a cache is seen at one moment, and where the next block stands."""

    rows: Rows                     # [B, C] each, of the first C slots
    next_order: Int[Array, "B"]    # of the next token
    next_rope: Int[Array, "B"]     # position id of the next block
    length: Int[Array, ""] | int   # slots in use, gaps counted: where the next block goes

    @property
    def capacity(self) -> int:
        return self.rows.order.shape[1]


class Context(NamedTuple):
    """B contexts of capacity C; the model computes in the dtype of `kv`."""

    kv: KeyValue    # [L, B, K, C, H] each
    view: View      # of all that was read


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
    return Context(kv, View(rows, zeros, zeros, 0))


def context_shardings(contexts: Context, mesh: jax.sharding.Mesh) -> Context:
    """Contexts are dealt like packs, and their heads over `tensor`."""
    heads = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor"))
    return Context(KeyValue(heads, heads), _view_shardings(contexts.view, mesh))


def _view_shardings(view: View, mesh: jax.sharding.Mesh) -> View:
    dealt = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.tree.map(lambda x: dealt if jnp.ndim(x) else replicated(mesh), view)


def place(context: Context, mesh: jax.sharding.Mesh) -> Context:
    """The contexts on the devices of a mesh."""
    kv = jax.device_put(context.kv, context_shardings(context, mesh).kv)
    return Context(kv, _place_view(context.view, mesh))


def _place_view(view: View, mesh: jax.sharding.Mesh) -> View:
    # The length stays with the host, which would have to wait for a device to know it.
    return jax.device_put(view, _view_shardings(view, mesh))._replace(length=view.length)


def enlarge(context: Context, capacity: int) -> Context:
    """The same contexts with room for `capacity` tokens; they are never made smaller."""
    kv, view = context
    if capacity <= view.capacity:
        return context
    return Context(_pad_kv(kv, capacity), view._replace(rows=_pad_rows(view.rows, capacity)))


def _pad_kv(kv: KeyValue, capacity: int) -> KeyValue:
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, capacity - x.shape[3]), (0, 0)))
    return KeyValue(*map(pad, kv))


def _pad_rows(rows: Rows, capacity: int) -> Rows:
    batch, old = rows.order.shape
    return join_rows((rows, Rows(*map(jnp.asarray, padding_rows((batch, capacity - old))))))


def fork(context: Context, view: View) -> Context:
    """The contexts as one of their views sees them, in a cache of their own."""
    return Context(KeyValue(*(jnp.copy(x[:, :, :, :view.capacity]) for x in context.kv)), view)


def repeat(context: Context, times: int) -> Context:
    """Each context as the common start of `times` contexts, in a cache of their own."""
    if times == 1:
        return fork(context, context.view)
    kv, (*view, length) = context
    view = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), view)
    return Context(KeyValue(*(jnp.repeat(x, times, axis=1) for x in kv)), View(*view, length))


def gather(contexts: Sequence[Context], places: Sequence[Sequence[int]], mesh: jax.sharding.Mesh) -> Context:
    """Contexts of several batches as one batch, in a cache of its own, on the devices of a mesh.

    Args: places are which contexts of each batch. The longest makes room for the others, which have gaps.
    """
    capacity = max(context.kv.key.shape[3] for context in contexts)
    parts = [_pad_kv(_take(context.kv, which, axis=1), capacity) for context, which in zip(contexts, places)]
    kv = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *parts)
    return place(Context(kv, gather_views([context.view for context in contexts], places, mesh)), mesh)


def gather_views(views: Sequence[View], places: Sequence[Sequence[int]], mesh: jax.sharding.Mesh) -> View:
    """Views of caches that `gather` makes one of, as views of that one."""
    capacity = max(view.capacity for view in views)
    parts = [_take(view._replace(rows=_pad_rows(view.rows, capacity), length=None), which, axis=0)
             for view, which in zip(views, places)]
    view = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
    return _place_view(view._replace(length=max(view.length for view in views)), mesh)


def _take(tree: T, places: Sequence[int], axis: int) -> T:
    return jax.tree.map(lambda x: jnp.take(x, np.array(places), axis), tree)


def append_text(model: IRG, context: Context, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
                ) -> tuple[Context, Float[Array, "B T D"]]:
    """Reads a text, its brackets among `tokens`; of each row the first `lengths` count.

    Returns the contexts after it, and the hidden states of the text.
    """
    place = jnp.arange(tokens.shape[1])
    valid = place < lengths[:, None]
    view = context.view
    order = view.next_order[:, None] + place
    rows = Rows(order=jnp.where(valid, order, INF), first=jnp.where(valid, 0, INF), span=order,
                last=jnp.where(valid, order, -1), noised=jnp.zeros_like(valid),
                rope=view.next_rope[:, None] + place)
    text = Part(model.embed_text(tokens, context.kv.key.dtype), rows)
    context, hidden = _append(model, context, text, order=lengths, rope=lengths)
    return context, hidden.text


def append_vit(model: IRG, context: Context, brackets: Int[Array, "2"],
               patches: UInt8[Array, "B V P*P*3"], position: Int[Array, "V"]) -> Context:
    """Reads an image through the ViT; `brackets` are the ids of its two brackets."""
    outside, inside = image_rows(context.view, patches.shape[1])
    position = jnp.broadcast_to(position, patches.shape[:2])
    pixels = normalize_pixels(patches, context.kv.key.dtype)
    return _append_image(model, context, _bracket_part(model, brackets, outside, pixels.dtype),
                         vit=Part(model.embed_vit(pixels, position, inside), inside))


def append_latent(model: IRG, context: Context, brackets: Int[Array, "2"],
                  latent: Float[Array, "B G P*P*Z"], position: Int[Array, "G"]) -> Context:
    """Reads a finished image as clean latents (t = 0); they are scaled, as `pack_latent` gives."""
    outside, inside = image_rows(context.view, latent.shape[1])
    latent = latent.astype(context.kv.key.dtype)
    return _append_image(model, context, _bracket_part(model, brackets, outside, latent.dtype),
                         latent=Part(_embed_latent(model, latent, 0.0, position), inside))


def predict_velocities(model: IRG, seen: Sequence[tuple[KeyValue, Sequence[View]]], brackets: Int[Array, "2"],
                       latent: Float[Array, "B G P*P*Z"], t: Float[Array, ""],
                       position: Int[Array, "G"]) -> list[Float[Array, "B G P*P*Z"]]:
    """Flow velocities at time t of a noised image after each view of some caches, which it never enters.

    One pass for all views: whatever is no attention is computed as if they were one sequence.
    """
    _, hidden = _predict(model, seen, brackets, latent, t, position, norm=True)
    return jnp.split(model.velocity(hidden), sum(len(views) for _, views in seen), axis=1)


def predict_added(model: IRG, seen: Sequence[tuple[KeyValue, Sequence[View]]], brackets: Int[Array, "2"],
                  latent: Float[Array, "B G P*P*Z"], t: Float[Array, ""], position: Int[Array, "G"]
                  ) -> Float[Array, "B N*G D"]:
    """What all layers add to the image's tokens, after each of N views: see `predict_velocities`."""
    embedded, hidden = _predict(model, seen, brackets, latent, t, position, norm=False)
    return hidden - embedded


def velocities_with(model: IRG, added: Float[Array, "B N*G D"], latent: Float[Array, "B G P*P*Z"],
                    t: Float[Array, ""], position: Int[Array, "G"]) -> list[Float[Array, "B G P*P*Z"]]:
    """`predict_velocities`, if this is what the layers add."""
    count = added.shape[1] // latent.shape[1]
    embedded = jnp.tile(_embed_latent(model, latent.astype(added.dtype), t, position), (1, count, 1))
    return jnp.split(model.velocity(model.decoder.norm_gen(embedded + added)), count, axis=1)


def _predict(model, seen, brackets, latent, t, position, *, norm: bool):
    """Embedded tokens [B, N * G, D] of an image at time t, and the hidden states after all layers."""
    views = [view for _, views in seen for view in views]
    outside, inside = map(join_rows, zip(*(image_rows(view, latent.shape[1], noised=True) for view in views)))
    latent = latent.astype(seen[0][0].key.dtype)
    embedded = jnp.tile(_embed_latent(model, latent, t, position), (1, len(views), 1))
    streams, rows = _stream(_bracket_part(model, jnp.tile(brackets, len(views)), outside, latent.dtype),
                            latent=Part(embedded, inside))
    pasts = [Past(kv, tuple(view.rows for view in views)) for kv, views in seen]
    return embedded, model(streams, rows, pasts, norm=norm)[0].latent


def image_rows(view: View, num_tokens: int, *, noised: bool = False) -> tuple[Rows, Rows]:
    """Rows of the next image block: of its two brackets [B, 2], and inside them [B, num_tokens].

    All of a block see each other and share one position id.
    """
    start = view.next_order[:, None]
    last = start + num_tokens + 1

    def make(order):
        same = lambda value: jnp.broadcast_to(value, order.shape)
        return Rows(order, same(0), same(start), same(last), same(noised),
                    same(view.next_rope[:, None]))
    return make(jnp.concatenate([start, last], axis=1)), make(start + 1 + jnp.arange(num_tokens))


def _bracket_part(model, brackets, rows: Rows, dtype) -> Part:
    return Part(model.embed_text(jnp.broadcast_to(brackets, rows.order.shape), dtype), rows)


def _embed_latent(model, latent, t, position):
    time = jnp.full(latent.shape[:2], t, jnp.float32)
    return model.embed_latent(latent, time, jnp.broadcast_to(position, time.shape))


def _append_image(model, context: Context, outside: Part, **inside: Part) -> Context:
    (part,) = inside.values()
    return _append(model, context, outside, **inside, order=part.embedded.shape[1] + 2, rope=1)[0]


def _append(model, context: Context, text: Part, *, order, rope, **inside: Part) -> tuple[Context, Streams]:
    """Runs a block and writes its keys and values at `length`; it uses up so many orders and position ids."""
    streams, rows = _stream(text, **inside)
    view = context.view
    hidden, new = model(streams, rows, [Past(context.kv, (view.rows,))], keep=True)
    write = lambda axis: lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), view.length, axis)
    new_rows = join_rows(rows)
    after = View(jax.tree.map(write(1), view.rows, new_rows), view.next_order + order, view.next_rope + rope,
                 view.length + new_rows.order.shape[1])
    return Context(jax.tree.map(write(3), context.kv, new), after), hidden


def _stream(text: Part, *, vit: Part | None = None, latent: Part | None = None
            ) -> tuple[Streams, Streams]:
    """Parts as the model's streams and their rows; what is not there has length 0."""
    none = jax.tree.map(lambda x: x[:, :0], text)
    parts = (text, vit or none, latent or none)
    return Streams(*(part.embedded for part in parts)), Streams(*(part.rows for part in parts))
