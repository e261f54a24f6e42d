"""From a packed batch to cross-entropy and flow-matching error.

Axes: B packs, T text tokens, V ViT patches, G latent tokens, N image slots, Z values of a latent token,
D width. Source: the training forward of `Bagel` (modeling/bagel/bagel.py) and IRG's training script.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.batch import PackedBatch
from irg_jax.models.autoencoder import Autoencoder
from irg_jax.models.irg import IRG, normalize_pixels, pack_latent
from irg_jax.models.streams import Streams
from irg_jax.parallel.shards import Axes, deal, per_shard, share_out

CE_CHUNK = 1024  # text tokens whose logits exist at once: 8,192 x 152,064 in float32 would be 5 GB


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is learnt, and how much of it."""

    ce_weight: float = 1.0
    mse_weight: float = 1.0
    timestep_shift: float = 4.0                       # t' = s t / (1 + (s - 1) t)
    posterior: Literal["sample", "mean"] = "sample"   # the original samples, golden values use the mean
    vae_batch: int = 1                                # images the frozen encoder takes at once

    def __post_init__(self):
        if min(self.ce_weight, self.mse_weight) < 0 or not self.ce_weight + self.mse_weight:
            raise ValueError(f"ce_weight is {self.ce_weight} and mse_weight {self.mse_weight}; neither may be "
                             "negative, and one must be positive")


class Flow(NamedTuple):
    """The flow-matching problem of a batch: [B, G, Z], [B, G, Z], [B, G]."""

    noisy: Float[Array, "B G Z"]
    target: Float[Array, "B G Z"]
    t: Float[Array, "B G"]


def shift_timestep(t: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    return shift * t / (1 + (shift - 1) * t)


def encode_image(
    vae: Autoencoder, pixels: UInt8[Array, "G X"], height: Int[Array, ""], width: Int[Array, ""],
    dtype: DTypeLike
) -> Float[Array, "G Y"]:
    """Means, then log variances (float32, unscaled), of the tokens of one image on a square canvas.

    `pixels` holds the canvas token by token; the image is its top left height x width tokens. What lies
    beyond is masked (see `Autoencoder.encode`), so the moments depend on the image alone.
    """
    side, size = math.isqrt(pixels.shape[0]), math.isqrt(pixels.shape[1] // 3)
    rows, columns = jnp.divmod(jnp.arange(side * side), side)
    inside = (rows < height) & (columns < width)
    image = rearrange(pixels, "(r c) (p q x) -> 1 (r p) (c q) x", r=side, p=size, x=3)
    mask = repeat(inside, "(r c) -> 1 (r p) (c q) 1", r=side, p=size, q=size)
    moments = vae.encode(normalize_pixels(image, dtype), mask)
    return jnp.concatenate([pack_latent(x.astype(jnp.float32), size // vae.config.downsample)[0]
                            for x in moments], axis=-1)


def encode_moments(
    vae: Autoencoder, batch: PackedBatch, config: LossConfig, canvas: int, dtype: DTypeLike
) -> Float[Array, "B G Y"]:
    """Moments of all latent tokens of a batch, image by image on a square canvas of `canvas` tokens.

    Devices encode the images of their own packs, and those that share a pack share its images.
    """
    encode = lambda vae, batch: _encode_share(vae, batch, config, canvas, dtype)
    return per_shard(encode, (Axes(), Axes("packs")), Axes("packs"))(vae, batch)


def _encode_share(
    vae: Autoencoder, batch: PackedBatch, config: LossConfig, canvas: int, dtype: DTypeLike
) -> Float[Array, "B G Y"]:
    packs, slots = batch.image_start.shape
    rows, columns = jnp.divmod(jnp.arange(canvas * canvas), canvas)

    def encode(slot):
        pack, start, height, width = slot
        inside = (rows < height) & (columns < width)
        token = jnp.where(inside, start + rows * width + columns, 0)
        return encode_image(vae, batch.latent_pixels[pack, token], height, width, dtype)

    pack = jnp.broadcast_to(jnp.arange(packs)[:, None], (packs, slots))
    table = (pack, batch.image_start, batch.image_height, batch.image_width)
    canvases = share_out(lambda table: jax.lax.map(encode, table, batch_size=config.vae_batch),
                         tuple(x.reshape(-1) for x in table), "tokens")
    canvases = canvases.reshape(packs, slots * canvas * canvas, -1)

    slot = jnp.minimum(batch.latent_image, slots - 1)
    of_token = lambda table: jnp.take_along_axis(table, slot, axis=1)
    local = jnp.arange(batch.latent_image.shape[1]) - of_token(batch.image_start)
    row, column = jnp.divmod(local, jnp.maximum(of_token(batch.image_width), 1))
    index = jnp.where(batch.latent_image < slots, (slot * canvas + row) * canvas + column, 0)
    return jnp.take_along_axis(canvases, index[..., None], axis=1)


def encode_latents(
    vae: Autoencoder, batch: PackedBatch, config: LossConfig, canvas: int, key: jax.Array, dtype: DTypeLike
) -> Float[Array, "B G Z"]:
    """Scaled latents of all images of the batch, drawn from their posterior.

    Batches that carry moments skip the encoder; the posterior, and the noise, are the same.
    """
    moments = batch.latent_moments.astype(jnp.float32)
    if not moments.shape[-1]:
        moments = encode_moments(vae, batch, config, canvas, dtype)
    latent, logvar = jnp.split(moments, 2, axis=-1)
    if config.posterior == "sample":
        latent = latent + jnp.exp(0.5 * logvar) * jax.random.normal(key, latent.shape)
    return jax.lax.stop_gradient(vae.scale(latent))


def make_flow(batch: PackedBatch, latent: Float[Array, "B G Z"], noise: Float[Array, "B G Z"],
              shift: float) -> Flow:
    """x_t = (1 - t) x_0 + t noise, target noise - x_0, one t an image; clean images have t = 0."""
    slots = batch.image_timestep.shape[1]
    t = shift_timestep(jax.nn.sigmoid(batch.image_timestep), shift)
    t = jnp.take_along_axis(t, jnp.minimum(batch.latent_image, slots - 1), axis=1)
    t = jnp.where(batch.latent_image < slots, t, 0.0)
    mix = t[..., None]
    return Flow((1 - mix) * latent + mix * noise, noise - latent, t)


def cross_entropy(
    model: IRG, hidden: Float[Array, "B T D"], target: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood a token in float32; logits exist a chunk of tokens at a time."""
    packs, length, width = hidden.shape
    pad = -length % min(CE_CHUNK, length)
    chunks = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        .reshape(packs, -1, min(CE_CHUNK, length), *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(chunk):
        logits = model.logits(chunk[0])
        chosen = jnp.take_along_axis(logits, chunk[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen
    losses = jax.lax.map(one, (chunks(hidden), chunks(target)))
    return jnp.moveaxis(losses, 0, 1).reshape(packs, length + pad)[:, :length]


def token_losses(
    model: IRG, batch: PackedBatch, flow: Flow, *, dtype: DTypeLike, remat: str
) -> tuple[Float[Array, "B T"], Float[Array, "B G Z"]]:
    """Per-token cross-entropy, and squared velocity error per latent value; unweighted."""
    rows = Streams(batch.text_rows, batch.vit_rows, batch.latent_rows)
    embedded = deal(Streams(
        model.embed_text(batch.text_ids, dtype),
        model.embed_vit(normalize_pixels(batch.vit_patches, dtype), batch.vit_position, batch.vit_rows,
                        remat=remat),
        model.embed_latent(flow.noisy.astype(dtype), flow.t, batch.latent_position)))
    hidden = deal(model(embedded, rows, remat=remat)[0])
    ce = cross_entropy(model, hidden.text, batch.text_target)
    return ce, (model.velocity(hidden.latent) - flow.target) ** 2


class Losses(NamedTuple):
    """Of a whole batch, and of each of its M groups of records: of text and of images."""

    ce: Float[Array, ""]
    mse: Float[Array, ""]
    group_ce: Float[Array, "M"]
    group_mse: Float[Array, "M"]


def count_totals(batch: PackedBatch, groups: int = 0) -> Losses:
    """Weights of all loss tokens of the global batch: the divisors of its losses."""
    text, latent = batch.text_weight, batch.latent_weight
    return Losses(jnp.sum(text), jnp.sum(latent), _by_group(text, batch.text_group, groups),
                  _by_group(latent, batch.latent_group, groups))


def mean_losses(
    ce: Float[Array, "B T"], error: Float[Array, "B G Z"], batch: PackedBatch, totals: Losses
) -> Losses:
    """This part's share of the means over the global batch; no loss tokens give zero."""
    ce, error, groups = ce * batch.text_weight, jnp.mean(error, -1) * batch.latent_weight, len(totals.group_ce)
    sums = Losses(jnp.sum(ce), jnp.sum(error), _by_group(ce, batch.text_group, groups),
                  _by_group(error, batch.latent_group, groups))
    return jax.tree.map(lambda part, total: part / jnp.where(total > 0, total, 1.0), sums, totals)


def _by_group(values: Float[Array, "B _"], group: Int[Array, "B _"], groups: int) -> Float[Array, "M"]:
    sums = [jnp.sum(values, where=group == number) for number in range(groups)]
    return jnp.stack(sums) if sums else jnp.zeros(0)
