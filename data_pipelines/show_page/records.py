"""Sample records made ready to draw: each part with what it is, and whether it is learned."""

import dataclasses
import re
import zlib

import numpy as np

from data_pipelines import images
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.datasets import Source
from data_pipelines.records import ImagePart, Record, TextPart
from data_pipelines.samples import Kind, measure, unfold
from data_pipelines.show_page.drawing import embed_picture
from data_pipelines.tokenizer import Tokenizer

MAX_PARTS = 24      # of a record
MAX_CHARS = 2_000   # of a text
# Control characters, and those that turn the direction of what follows them.
_UNSEEMLY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which a part enters a sample; None where no configuration says how long it is."""

    kind: str
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class PartView:
    """A text, clipped, or a picture; `error` says why a picture cannot be shown."""

    is_text: bool
    learned: bool
    uses: tuple[Use, ...]
    text: str = ""
    hidden_chars: int = 0
    picture: str = ""
    size: tuple[int, int] = (0, 0)
    num_bytes: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class RecordView:
    """A record; with an `error` it could not be read, and has no parts."""

    index: int
    place: str
    parts: tuple[PartView, ...] = ()
    hidden_parts: int = 0
    error: str = ""


def choose_records(source: Source, *, mode: str, count: int, seed: int) -> list[int]:
    """Indices of `count` records, by chance, ascending; the same ones for the same seed."""
    rng = np.random.default_rng((seed, zlib.crc32(mode.encode())))
    return sorted(rng.choice(len(source), min(count, len(source)), replace=False).tolist())


def view_record(source: Source, index: int, config: DataConfig, *, group: GroupConfig,
                tokenizer: Tokenizer | None) -> RecordView:
    """Reads one record; one that cannot be read becomes the sentence that says why.

    Args: tokenizer is None where only a folder is known: costs are left out.
    """
    try:
        record = source[index]
        costs = measure(record, config, tokenizer, group=group) if tokenizer else None
    except ValueError as error:
        return RecordView(index, "", error=clip(str(error), MAX_CHARS)[0])
    uses = _list_uses(record, costs)
    parts = tuple(_view_part(part, tuple(uses[i]), config) for i, part in enumerate(record.parts[:MAX_PARTS]))
    place = clip(record.place.removeprefix(config.source).lstrip("/"), MAX_CHARS)[0]
    return RecordView(index, place, parts, max(0, len(record.parts) - MAX_PARTS))


def clip(text: str, limit: int) -> tuple[str, int]:
    """At most `limit` characters that can be shown, and how many more there are."""
    shown = _UNSEEMLY.sub("\N{REPLACEMENT CHARACTER}", text[:limit])
    if len(text) <= limit:
        return shown, 0
    return shown + "\N{HORIZONTAL ELLIPSIS}", len(text) - limit


def _list_uses(record: Record, costs: np.ndarray | None) -> list[list[Use]]:
    """For each part how it enters; parts are told apart by identity, for two may be equal."""
    number = {id(part): i for i, part in enumerate(record.parts)}
    uses: list[list[Use]] = [[] for _ in record.parts]
    for row, (kind, part) in enumerate(unfold(record)):
        tokens = None if costs is None else int(costs[row, 1:4].sum())
        uses[number[id(part)]].append(Use(Kind(kind).name.lower(), tokens))
    return uses


def _view_part(part: TextPart | ImagePart, uses: tuple[Use, ...], config: DataConfig) -> PartView:
    if isinstance(part, TextPart):
        text, hidden = clip(part.text, MAX_CHARS)
        return PartView(True, part.need_loss, uses, text=text, hidden_chars=hidden)
    view = PartView(False, part.need_loss, uses, num_bytes=len(part.data))
    try:
        image = images.decode_image(part.data, where=part.place, max_pixels=config.max_image_pixels)
    except ValueError as error:
        return dataclasses.replace(view, error=clip(str(error), MAX_CHARS)[0])
    return dataclasses.replace(view, picture=embed_picture(image), size=image.shape[1::-1])
