"""A pack read back from its arrays alone: what happened when, in which stream, and what is learned.

Nothing is taken from the plan here, so that the page shows what training gets and not what was meant.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import INF, PackedBatch, Rows
from data_pipelines.config import DataConfig
from data_pipelines.images import unpatchify
from data_pipelines.samples import Kind
from data_pipelines.tokenizer import Tokenizer

STREAMS = ("text", "vit", "latent")


class Tokens(NamedTuple):
    """The tokens of a pack in the order they happened, padding left out; arrays are [S]."""

    stream: np.ndarray   # index into STREAMS
    index: np.ndarray    # place in that stream
    rows: Rows
    learned: np.ndarray  # bool: carries loss


@dataclasses.dataclass(frozen=True)
class Block:
    """One text, or one image with its two brackets; tokens start to stop of `Tokens`."""

    kind: Kind
    start: int
    stop: int
    num_learned: int
    text: str = ""
    picture: np.ndarray | None = None  # uint8 [H, W, 3] as it enters; None for moments
    timestep: float = -np.inf          # the draw before sigmoid and shift

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


def order_tokens(pack: PackedBatch) -> Tokens:
    """All tokens of a pack (without B axis) that are no padding, by `order`."""
    streams = (pack.text_rows, pack.vit_rows, pack.latent_rows)
    sizes = [len(rows.order) for rows in streams]
    rows = Rows(*(np.concatenate(parts) for parts in zip(*streams)))
    learned = np.concatenate([pack.text_weight > 0, np.zeros(sizes[1], bool), pack.latent_weight > 0])
    stream = np.repeat(np.arange(len(STREAMS)), sizes)
    index = np.concatenate([np.arange(size) for size in sizes])
    happened = np.argsort(rows.order, kind="stable")[:np.count_nonzero(rows.order < INF)]
    take = lambda values: values[happened]
    return Tokens(take(stream), take(index), Rows(*map(take, rows)), take(learned))


def read_samples(pack: PackedBatch, tokens: Tokens, config: DataConfig,
                 tokenizer: Tokenizer) -> list[list[Block]]:
    """The blocks of each sample of a pack, in order."""
    rows, is_text = tokens.rows, tokens.stream == 0
    ids = np.where(is_text, pack.text_ids[np.where(is_text, tokens.index, 0)], -1)
    image = rows.last > rows.span
    opens = np.where(image, rows.order == rows.span, ids == tokenizer.bos)
    starts = np.flatnonzero(opens)
    samples: dict[int, list[Block]] = {}
    for start, stop in zip(starts, [*starts[1:], len(opens)]):
        block = _read_block(pack, tokens, int(start), int(stop), config, tokenizer)
        samples.setdefault(int(rows.first[start]), []).append(block)
    return list(samples.values())


def _read_block(pack: PackedBatch, tokens: Tokens, start: int, stop: int, config: DataConfig,
                tokenizer: Tokenizer) -> Block:
    index = tokens.index[start:stop]
    learned = int(tokens.learned[start:stop].sum())
    if tokens.rows.last[start] == tokens.rows.span[start]:
        return Block(Kind.TEXT, start, stop, learned, text=tokenizer.decode(pack.text_ids[index[1:-1]]))
    inner = index[1:-1]
    if STREAMS[tokens.stream[start + 1]] == "vit":
        side, position = config.vit_max_side, pack.vit_position[inner]
        size = position.max() // side + 1, (position % side).max() + 1
        picture = unpatchify(pack.vit_patches[inner], *size, config.vit_patch)
        return Block(Kind.VIT, start, stop, learned, picture=picture)
    slot = int(pack.latent_image[inner[0]])
    size = int(pack.image_height[slot]), int(pack.image_width[slot])
    pixels = pack.latent_pixels[inner]
    picture = unpatchify(pixels, *size, config.latent_patch) if pixels.shape[-1] else None
    kind = Kind.NOISED if tokens.rows.noised[start] else Kind.CLEAN
    return Block(kind, start, stop, learned, picture=picture, timestep=float(pack.image_timestep[slot]))
