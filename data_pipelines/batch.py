"""The batch contract: a pack is three streams, and integers say how they belong together.

    [ text T | vit V | latent G ]     understanding expert: text and vit;  generation expert: latent

The streams hold tokens by kind, not by time. What happened when, and who may see whom, is written in
integer rows beside each token (`Rows`); attention and RoPE read those and nothing else. This module works
on any array type (numpy in the pipeline, jax in the model) and is the only thing both sides share.

Axes: B packs, T text tokens, V ViT patches, G latent tokens, N image slots, S any token axis.
"""

from typing import Any, NamedTuple

import numpy as np

INF = np.int32(2**31 - 1)  # the order of padding keys and the `first` of padding queries
PIXELS_PER_TOKEN = 16      # a latent token covers 16 x 16 pixels: VAE factor 8, patches of 2 x 2


class Rows(NamedTuple):
    """Six integers a token; each field is int32 [..., S], `noised` is bool.

    A prompt of two words, then an image of two noised tokens between its brackets:

        token    <s>  a   b  </s> |  <v>  z0  z1  </v>
        order     0   1   2   3   |   4   5   6   7      strictly increasing through the pack
        first     0   0   0   0   |   0   0   0   0      order of the sample's first token
        span      0   1   2   3   |   4   4   4   4      order of the first token of the own block
        last      0   1   2   3   |   7   7   7   7      order of the last token of the own block
        noised    .   .   .   .   |   x   x   x   x      the block is a noised image
        rope      0   1   2   3   |   4   4   4   4      position id; images share one

    Padding: first = INF, last = -1, order = INF, so that it sees nothing and nobody sees it.
    """

    order: Any
    first: Any
    span: Any
    last: Any
    noised: Any
    rope: Any


def padding_rows(shape: tuple[int, ...]) -> Rows:
    """Numpy rows of nothing but padding, to be filled in place."""
    full = lambda value: np.full(shape, value, np.int32)
    return Rows(full(INF), full(INF), full(INF), full(-1), np.zeros(shape, bool), full(0))


def visible(query: Rows, key: Rows) -> Any:
    """Who sees whom: bool [..., Sq, Sk]. Causal, or same image; never a noised image from outside.

    Source: `prepare_attention_mask_per_sample` of BAGEL's data/data_utils.py, as integers. This is the
    definition; only tests and small tiles may evaluate it for whole sequences.
    """
    first, span, last = (row[..., :, None] for row in (query.first, query.span, query.last))
    order, noised = key.order[..., None, :], key.noised[..., None, :]
    return (first <= order) & (order <= last) & (~noised | (order >= span))


class PackedBatch(NamedTuple):
    """B packs; a pytree of arrays with static shapes.

    Text: token `text_ids`; `text_target` is the next token's id where `text_weight` > 0. `text_group` and
    `latent_group` number the group of records that a token is of, for telling losses apart (0 in padding).
    ViT: `vit_patches` holds 14 x 14 x 3 uint8 values a token in (row, column, channel) order.
    Latent: tokens of an image row by row, either as `latent_pixels`, 16 x 16 x 3 uint8 values a token,
    or as `latent_moments`, the frozen encoder's means and log variances of the token's Z values; the
    other has no values at all.
    `latent_image` is the token's slot in the image table (N for padding).
    Image table: `image_start` is the slot's first index in the latent stream, `image_height` and
    `image_width` count latent tokens (0 for an empty slot), `image_timestep` is the logit-normal draw
    before sigmoid and shift (-inf for a clean image: t = 0).
    """

    text_ids: Any        # int32   [B, T]
    text_target: Any     # int32   [B, T]
    text_weight: Any     # float32 [B, T]
    text_group: Any      # int32   [B, T]
    text_rows: Rows      # [B, T] each
    vit_patches: Any     # uint8   [B, V, patch * patch * 3]
    vit_position: Any    # int32   [B, V]   row * side + column in the learned table
    vit_rows: Rows       # [B, V] each
    latent_pixels: Any   # uint8   [B, G, 16 * 16 * 3] or [B, G, 0]
    latent_moments: Any  # float16 or float32 [B, G, 2 * Z] or [B, G, 0]
    latent_position: Any # int32   [B, G]   row * side + column in the fixed table
    latent_image: Any    # int32   [B, G]
    latent_weight: Any   # float32 [B, G]   1 where the token carries the flow loss
    latent_group: Any    # int32   [B, G]
    latent_rows: Rows    # [B, G] each
    image_start: Any     # int32   [B, N]
    image_height: Any    # int32   [B, N]
    image_width: Any     # int32   [B, N]
    image_timestep: Any  # float32 [B, N]
