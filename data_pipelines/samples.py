"""A record becomes a sample: the items that enter a pack, what they cost, and which are dropped.

A text part is one item. An image part is up to three, in this order: a noised VAE image (the one
to learn), a clean VAE image and a ViT image (conditions). Costs come from image headers, so packs
can be planned without decoding a pixel; dropout and timesteps are drawn by (seed, group, epoch,
record), so the planner and the assembler, in any process, see the same sample.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines import images
from data_pipelines.choices import choose, choose_many
from data_pipelines.config import DataConfig, GroupConfig, ImageTransform
from data_pipelines.records import ImagePart, Kind, Record, TextPart
from data_pipelines.tokenizer import Tokenizer

BRACKETS = 2  # <|im_start|> ... <|im_end|> around a text, <|vision_start|> ... around an image
BLOCK = 256   # records whose randomness comes from one generator
_UNIFORM, _NORMAL = range(2)  # its purposes


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


def unfold(record: Record, system_prompt: str = "") -> Iterator[tuple[Kind, TextPart | ImagePart]]:
    """The candidates of a record, before choice and dropout, in the original's order."""
    if system_prompt:
        yield Kind.SYSTEM, TextPart(system_prompt, False, f"{record.place}, system prompt")
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


def check_flags(part: TextPart | ImagePart) -> None:
    """Raises: ValueError if it is an image without a flag, which the original passes over in silence."""
    if isinstance(part, ImagePart) and not (part.need_loss or part.need_vae or part.need_vit):
        raise ValueError(f"{part.place}: the image has none of the flags need_loss, need_vae and need_vit, so "
                         "it would enter nowhere; set one, or remove the part")


def check_opening(record: Record, system_prompt: str) -> None:
    """Raises: ValueError if the record opens with the system prompt that it will be given."""
    if system_prompt and record.parts and system_prompt == getattr(record.parts[0], "text", None):
        raise ValueError(f"{record.place}: the record opens with the system prompt itself; leave system_prompt "
                         "empty, or it would stand there twice")


def measure(record: Record, config: DataConfig, tokenizer: Tokenizer, *, group: GroupConfig) -> np.ndarray:
    """int32 [items, 5]: kind and the four fields of `Cost`, from texts and image headers alone.

    Without the system prompt, which is not the record's.

    Raises: ValueError naming the part whose image cannot be read, outgrows its position table or enters
        nowhere.
    """
    for part in record.parts:
        check_flags(part)
    rows, num_images = [], _sharers(record, group)
    for kind, part in unfold(record):
        if kind == Kind.TEXT:
            rows.append((kind, len(tokenizer.encode(part.text)) + BRACKETS, 0, 0, 0))
            continue
        transform, patch, side = image_rule(kind, config, group)
        width, height = images.target_size(
            *images.image_size(part.data, where=part.place, max_pixels=config.max_image_pixels),
            transform, num_images=num_images)
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
    Every text of a record is droppable, loss-bearing or not; an image that is learned never is, nor the
    system prompt: the contexts that guidance compares with hold it too.
    Source: `enable_cfg` and `timestep` in BAGEL's data/dataset_base.py.
    """
    block, lane = divmod(index, BLOCK)
    uniform = _generator(_UNIFORM, config, group, epoch, block).random((len(kinds), 2, BLOCK))[:, :, lane]
    normal = _generator(_NORMAL, config, group, epoch, block).standard_normal((len(kinds), BLOCK), np.float32)
    chosen = choose(group.kind, kinds, uniform[:, 0])
    return Draws(chosen, uniform[chosen, 1] >= _dropout(config)[kinds[chosen]], normal[chosen, lane])


def draw_all(kinds: np.ndarray, offsets: np.ndarray, config: DataConfig, *, group: GroupConfig,
             epoch: int) -> np.ndarray:
    """bool [M]: which candidates of a whole group enter in an epoch, the same that `draw` says one by one.

    Args:
        kinds: int [M], the candidates of R records one after the other.
        offsets: int [R + 1]; record i has those from offsets[i] to offsets[i + 1], perhaps none.
    """
    counts = np.diff(offsets)
    record = np.repeat(np.arange(len(counts)), counts)
    rank, lane = np.arange(len(kinds)) - offsets[record], record % BLOCK
    uniform = np.empty((2, len(kinds)))
    for block in range(-(-len(counts) // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(counts))
        most, where = counts[first:last].max(), slice(offsets[first], offsets[last])
        drawn = _generator(_UNIFORM, config, group, epoch, block).random((most, 2, BLOCK))
        uniform[:, where] = drawn[rank[where], :, lane[where]].T
    enters = choose_many(group.kind, kinds, offsets, uniform[0])
    return enters & (uniform[1] >= _dropout(config)[kinds])


def _generator(purpose: int, config: DataConfig, group: GroupConfig, epoch: int,
               block: int) -> np.random.Generator:
    """Of the randomness of BLOCK records in an epoch: candidate by candidate, for all records at once.

    So the numbers of a candidate depend on nothing but its place in its record and the record's index.
    """
    # crc32 names the group, so that adding a group changes no other group's draws.
    name = zlib.crc32(group.name.encode())
    return np.random.Generator(np.random.Philox((config.seed, name, epoch, block, purpose)))


def _dropout(config: DataConfig) -> np.ndarray:
    """The probability that an item is dropped, by `Kind`."""
    return np.array((config.text_dropout, config.vit_dropout, config.vae_dropout, 0.0, 0.0))


def realise(record: Record, draws: Draws, config: DataConfig, tokenizer: Tokenizer, *,
            group: GroupConfig, moments: Mapping[str, np.ndarray] | None = None) -> list[Item]:
    """The sample itself: texts encoded, images decoded and resized, dropped items gone or gaps.

    Args: moments of the record's VAE images by the place of their part, instead of pixels.
    Raises: ValueError naming the part whose image does not decode, or a record that already opens with the
        system prompt.
    """
    prompt = config.system_prompt_of(group)
    check_opening(record, prompt)
    items: list[Item] = []
    decoded: dict[str, np.ndarray] = {}  # a part that enters as VAE and ViT is decoded once
    candidates, num_images = list(unfold(record, prompt)), _sharers(record, group)
    for index, keep, timestep in zip(*draws, strict=True):
        kind, part = candidates[index]
        noised = kind == Kind.NOISED
        timestep = float(timestep) if noised else -np.inf
        if kind in (Kind.TEXT, Kind.SYSTEM):
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
            image = images.resize(decoded[part.place], image_rule(kind, config, group)[0],
                                  num_images=num_images)
            items.append(ViTImage(image) if kind == Kind.VIT else VAEImage(image, noised, timestep))
    return items


def cost_of(items: list[Item], config: DataConfig) -> Cost:
    """What the items of a sample cost in a pack, which is what `measure` said if nothing changed since."""
    text = vit = latent = num_images = 0
    for item in items:
        match item:
            case Text():
                text += len(item.ids) + BRACKETS
            case ViTImage():
                text, vit = text + BRACKETS, vit + item.image[..., 0].size // config.vit_patch**2
            case VAEImage() | VAEMoments():
                size = item.moments[..., 0].size if isinstance(item, VAEMoments) else (
                    item.image[..., 0].size // config.latent_patch**2)
                text, latent, num_images = text + BRACKETS, latent + size, num_images + 1
    return Cost(text, vit, latent, num_images)


def image_rule(kind: Kind, config: DataConfig, group: GroupConfig) -> tuple[ImageTransform, int, int]:
    """The transform, patch and position table side of an image item."""
    if kind == Kind.VIT:
        return group.vit_transform or config.vit_transform, config.vit_patch, config.vit_max_side
    return group.vae_transform or config.vae_transform, config.latent_patch, config.max_latent_size


def _sharers(record: Record, group: GroupConfig) -> int:
    """How many images share `max_pixels`: those of a vision-language record, as in BAGEL's vlm_dataset.py."""
    if group.kind != "vision_language":
        return 1
    return max(1, sum(isinstance(part, ImagePart) for part in record.parts))
