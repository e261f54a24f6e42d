"""A record becomes a sample: the items that enter a pack, what they cost, and which are dropped.

A text part is one item. An image part is up to three, in this order: a noised VAE image (the one
to learn), a clean VAE image and a ViT image (conditions). Costs come from image headers, so packs
can be planned without decoding a pixel; dropout and timesteps are drawn by (seed, group, epoch,
record), so the planner and the assembler, in any process, see the same sample.
"""

import enum
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines import images
from data_pipelines.choices import choose
from data_pipelines.config import DataConfig, GroupConfig, ImageTransform
from data_pipelines.records import ImagePart, Record, TextPart
from data_pipelines.tokenizer import Tokenizer

BRACKETS = 2  # <|im_start|> ... <|im_end|> around a text, <|vision_start|> ... around an image


class Kind(enum.IntEnum):
    """What an item is; also its code in cost tables."""

    TEXT = 0
    VIT = 1
    CLEAN = 2   # a VAE image as a condition
    NOISED = 3  # a VAE image to learn


class Cost(NamedTuple):
    """Tokens in each stream and slots of the image table."""

    text: int
    vit: int
    latent: int
    images: int


class Text(NamedTuple):
    """Token ids without brackets; with `loss`, each next id and the end token are targets."""

    ids: list[int]
    loss: bool


class ViTImage(NamedTuple):
    """uint8 [H, W, 3], sides multiples of the ViT patch."""

    image: np.ndarray


class VAEImage(NamedTuple):
    """uint8 [H, W, 3], sides multiples of the latent patch; `timestep` is -inf if not noised."""

    image: np.ndarray
    noised: bool
    timestep: float = -np.inf


class VAEMoments(NamedTuple):
    """A VAE image as the encoder's moments, float [h, w, 2 * Z] for h x w latent tokens."""

    moments: np.ndarray
    noised: bool
    timestep: float = -np.inf


class Gap(NamedTuple):
    """A dropped image condition: no token, but RoPE advances by one, as in the original."""


Item = Text | ViTImage | VAEImage | VAEMoments | Gap


class Draws(NamedTuple):
    """The randomness of one sample, an entry for each of the items that make it."""

    chosen: np.ndarray    # int64 [items]: indices into the record's candidates, see `choices.choose`
    keep: np.ndarray      # bool [items]
    timestep: np.ndarray  # float32 [items], N(0, 1)


def unfold(record: Record) -> Iterator[tuple[Kind, TextPart | ImagePart]]:
    """The items of a record before dropout, in the original's order."""
    for part in record.parts:
        if isinstance(part, TextPart):
            yield Kind.TEXT, part
            continue
        if part.need_loss:
            yield Kind.NOISED, part
        if part.need_vae:
            yield Kind.CLEAN, part
        if part.need_vit:
            yield Kind.VIT, part


def measure(record: Record, config: DataConfig, tokenizer: Tokenizer, *, group: GroupConfig) -> np.ndarray:
    """int32 [items, 5]: kind and the four fields of `Cost`, from texts and image headers alone.

    Raises: ValueError naming the part whose image cannot be read or outgrows its position table.
    """
    rows = []
    for kind, part in unfold(record):
        if kind == Kind.TEXT:
            rows.append((kind, len(tokenizer.encode(part.text)) + BRACKETS, 0, 0, 0))
            continue
        transform, patch, side = image_rule(kind, config, group)
        width, height = images.target_size(
            *images.image_size(part.data, where=part.place, max_pixels=config.max_image_pixels),
            transform)
        if max(width, height) > side * patch:
            raise ValueError(f"{part.place}: at {width} x {height} the image does not fit the "
                             f"{side} x {side} position table; lower max_size of its transform")
        tokens = (width // patch) * (height // patch)
        is_vit = kind == Kind.VIT
        rows.append((kind, BRACKETS, tokens * is_vit, tokens * (not is_vit), int(not is_vit)))
    return np.array(rows, np.int32).reshape(-1, 1 + len(Cost._fields))


def draw(kinds: np.ndarray, config: DataConfig, *, group: GroupConfig, epoch: int, index: int) -> Draws:
    """Choice, conditioning dropout and timesteps of one sample; a function of its arguments alone.

    Args:
        kinds: int [candidates], the record's `Kind` codes.
    Every text is droppable, loss-bearing or not; an image that is learned never is.
    Source: `enable_cfg` and `timestep` in BAGEL's data/dataset_base.py.
    """
    # crc32 names the group, so that adding a group changes no other group's draws.
    rng = np.random.default_rng((config.seed, zlib.crc32(group.name.encode()), epoch, index))
    probability = np.array((config.text_dropout, config.vit_dropout, config.vae_dropout, 0.0))
    uniform, timestep = rng.random((2, len(kinds))), rng.standard_normal(len(kinds)).astype(np.float32)
    chosen = choose(group.kind, kinds, uniform[0])
    return Draws(chosen, uniform[1, chosen] >= probability[kinds[chosen]], timestep[chosen])


def realise(record: Record, draws: Draws, config: DataConfig, tokenizer: Tokenizer, *,
            group: GroupConfig, moments: Mapping[str, np.ndarray] | None = None) -> list[Item]:
    """The sample itself: texts encoded, images decoded and resized, dropped items gone or gaps.

    Args: moments of the record's VAE images by the place of their part, instead of pixels.
    Raises: ValueError naming the part whose image does not decode.
    """
    items: list[Item] = []
    decoded: dict[str, np.ndarray] = {}  # a part that enters as VAE and ViT is decoded once
    candidates = list(unfold(record))
    for index, keep, timestep in zip(*draws, strict=True):
        kind, part = candidates[index]
        noised = kind == Kind.NOISED
        timestep = float(timestep) if noised else -np.inf
        if kind == Kind.TEXT:
            if keep:
                items.append(Text(tokenizer.encode(part.text), part.need_loss))
        elif not keep:
            items.append(Gap())
        elif kind != Kind.VIT and moments is not None:
            items.append(VAEMoments(moments[part.place], noised, timestep))
        else:
            if part.place not in decoded:
                decoded[part.place] = images.decode_image(part.data, where=part.place,
                                                          max_pixels=config.max_image_pixels)
            image = images.resize(decoded[part.place], image_rule(kind, config, group)[0])
            items.append(ViTImage(image) if kind == Kind.VIT else VAEImage(image, noised, timestep))
    return items


def image_rule(kind: Kind, config: DataConfig, group: GroupConfig) -> tuple[ImageTransform, int, int]:
    """The transform, patch and position table side of an image item."""
    if kind == Kind.VIT:
        return group.vit_transform or config.vit_transform, config.vit_patch, config.vit_max_side
    return group.vae_transform or config.vae_transform, config.latent_patch, config.max_latent_size
