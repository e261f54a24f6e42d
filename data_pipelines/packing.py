"""Samples become one pack: three streams and the integer rows that say how tokens belong together.

The layout and every row are defined in `batch.py`; `planning.py` decides who goes into which pack.
Arrays here are those of a single pack, without the leading B axis.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from einops import rearrange

from data_pipelines.batch import PackedBatch, Rows, padding_rows
from data_pipelines.config import DataConfig
from data_pipelines.images import grid_position, write_patches
from data_pipelines.moments import Layout
from data_pipelines.samples import Gap, Item, Text, VAEImage, VAEMoments, ViTImage
from data_pipelines.tokenizer import Tokenizer


def assemble(samples: Iterable[Iterable[Item]], *, config: DataConfig,
             tokenizer: Tokenizer, moments: Layout | None = None,
             into: PackedBatch | None = None, groups: Sequence[int] | None = None) -> PackedBatch:
    """Lays samples one after the other into the streams of one pack.

    Args:
        samples: each a sequence of items; together within the budgets of `config`.
        tokenizer: gives the ids of the four control tokens.
        moments: of the samples' VAE images, if they come as moments and not as pixels.
        into: an `empty_pack` to fill, instead of a new one.
        groups: the number of each sample's group; all 0 if left out.
    Returns: a PackedBatch of numpy arrays without the B axis.
    Source: `pack_sequence` of BAGEL's data/dataset_base.py.
    """
    writer = _Writer(config, tokenizer, into or empty_pack(config, moments))
    for sample, group in zip(samples, itertools.repeat(0) if groups is None else groups):
        writer.add(sample, group)
    return writer.batch


def empty_pack(config: DataConfig, moments: Layout | None = None, *, lead: tuple[int, ...] = ()) -> PackedBatch:
    """One pack of nothing but padding, to be filled in place; with `lead` (B,) it is B of them."""
    text, vit = (*lead, config.text_tokens), (*lead, config.vit_tokens)
    latent, images = (*lead, config.latent_tokens), (*lead, config.images)
    num_pixels = 0 if moments else config.latent_patch**2 * 3
    return PackedBatch(
        text_ids=np.zeros(text, np.int32),
        text_target=np.zeros(text, np.int32),
        text_weight=np.zeros(text, np.float32),
        text_group=np.zeros(text, np.int32),
        text_rows=padding_rows(text),
        vit_patches=np.zeros((*vit, config.vit_patch**2 * 3), np.uint8),
        vit_position=np.zeros(vit, np.int32),
        vit_rows=padding_rows(vit),
        latent_pixels=np.zeros((*latent, num_pixels), np.uint8),
        latent_moments=np.zeros((*latent, moments.values if moments else 0),
                                moments.dtype if moments else np.float32),
        latent_position=np.zeros(latent, np.int32),
        latent_image=np.full(latent, config.images, np.int32),
        latent_weight=np.zeros(latent, np.float32),
        latent_group=np.zeros(latent, np.int32),
        latent_rows=padding_rows(latent),
        image_start=np.zeros(images, np.int32),
        image_height=np.zeros(images, np.int32),
        image_width=np.zeros(images, np.int32),
        image_timestep=np.full(images, -np.inf, np.float32))


class _Writer:
    """The cursors of a pack being written; `first`, `rope` and `group` are those of the current sample."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, batch: PackedBatch):
        self.batch, self._config, self._tokenizer = batch, config, tokenizer
        self._text = self._vit = self._latent = self._image = 0
        self._order = self._first = self._rope = self._group = 0

    def add(self, sample: Iterable[Item], group: int = 0) -> None:
        self._first, self._rope, self._group = self._order, 0, group
        for item in sample:
            match item:
                case Text():
                    self._add_text(item)
                case ViTImage():
                    self._add_vit(item)
                case VAEImage() | VAEMoments():
                    self._add_vae(item)
                case Gap():
                    self._rope += 1

    def _add_text(self, item: Text) -> None:
        ids = [self._tokenizer.bos, *item.ids, self._tokenizer.eos]
        where = self._take_text(len(ids))
        self.batch.text_ids[where] = ids
        if item.loss:
            # Every position but the last predicts its successor; nothing follows the end token.
            learned = slice(where.start, where.stop - 1)
            self.batch.text_target[learned] = ids[1:]
            self.batch.text_weight[learned] = (
                (len(ids) - 1)**-0.5 if self._config.ce_reweight else 1.0)
        steps = np.arange(len(ids), dtype=np.int32)
        order = self._order + steps
        _set(self.batch.text_rows, where, Rows(
            order=order, first=self._first, span=order, last=order, noised=False,
            rope=self._rope + steps))
        self._order += len(ids)
        self._rope += len(ids)

    def _add_vit(self, item: ViTImage) -> None:
        patch = self._config.vit_patch
        height, width = item.image.shape[0] // patch, item.image.shape[1] // patch
        where = slice(self._vit, self._vit + height * width)
        self._vit = where.stop
        write_patches(item.image, patch, self.batch.vit_patches[where])
        self.batch.vit_position[where] = grid_position(height, width, self._config.vit_max_side)
        self._add_block(self.batch.vit_rows, where, noised=False)

    def _add_vae(self, item: VAEImage | VAEMoments) -> None:
        batch, slot = self.batch, self._image
        if isinstance(item, VAEMoments):
            height, width = item.moments.shape[:2]
        else:
            patch = self._config.latent_patch
            height, width = item.image.shape[0] // patch, item.image.shape[1] // patch
        where = slice(self._latent, self._latent + height * width)
        self._latent, self._image = where.stop, slot + 1
        if isinstance(item, VAEMoments):
            batch.latent_moments[where] = rearrange(item.moments, "h w z -> (h w) z")
        else:
            write_patches(item.image, patch, batch.latent_pixels[where])
        batch.latent_position[where] = grid_position(height, width, self._config.max_latent_size)
        batch.latent_image[where] = slot
        batch.latent_weight[where] = item.noised
        batch.latent_group[where] = self._group
        batch.image_start[slot] = where.start
        batch.image_height[slot], batch.image_width[slot] = height, width
        batch.image_timestep[slot] = item.timestep if item.noised else -np.inf
        self._add_block(batch.latent_rows, where, noised=item.noised)

    def _add_block(self, rows: Rows, where: slice, *, noised: bool) -> None:
        """The rows of one image: start bracket, its tokens in their own stream, end bracket."""
        count = where.stop - where.start
        start, last = self._order, self._order + count + 1
        block = Rows(order=None, first=self._first, span=start, last=last, noised=noised,
                     rope=self._rope)
        brackets = self._take_text(2)
        self.batch.text_ids[brackets] = (self._tokenizer.start_of_image,
                                         self._tokenizer.end_of_image)
        _set(self.batch.text_rows, brackets, block._replace(order=(start, last)))
        _set(rows, where, block._replace(order=np.arange(start + 1, last)))
        self._order = last + 1
        self._rope += not noised  # what follows a noised image never sees it, nor its position

    def _take_text(self, count: int) -> slice:
        where = slice(self._text, self._text + count)
        self._text = where.stop
        self.batch.text_group[where] = self._group
        return where


def _set(rows: Rows, where: slice, values: Rows) -> None:
    for row, value in zip(rows, values, strict=True):
        row[where] = value
