"""What a record is, and one `conversation` as released, read strictly.

    [{"role": "user", "content": "two red circles"},
     {"role": "assistant", "content": [
         {"type": "text", "content": "Plan: ...", "need_loss": true},
         {"type": "image", "content": "<base64>", "need_loss": true}]}]

becomes a flat `Record` of parts, as the records of `bagel_records.py` do. A record that cannot be
read whole is refused by file, row, turn and part: the original skips what it does not know, and
trains on the rest.
"""

import base64
import binascii
import enum
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Kind(enum.IntEnum):
    """What an item of a sample is; also its code in cost tables."""

    TEXT = 0
    VIT = 1
    CLEAN = 2   # a VAE image as a condition
    NOISED = 3  # a VAE image to learn
    SYSTEM = 4  # the system prompt, a text that opens the sample and is never dropped


class TextPart(NamedTuple):
    """A text; `need_loss` makes its tokens and its end token targets."""

    text: str
    need_loss: bool
    place: str


class ImagePart(NamedTuple):
    """An encoded image; the flags say how it enters: noised VAE, clean VAE, ViT, in this order."""

    data: bytes
    need_loss: bool
    need_vae: bool
    need_vit: bool
    place: str


class Record(NamedTuple):
    """All parts in order, its mode, and where it came from; see `choices` for what enters a sample."""

    parts: tuple[TextPart | ImagePart, ...]
    mode: str
    place: str


class Limits(NamedTuple):
    """What a reader accepts; see the fields of the same meaning in `DataConfig`."""

    unknown_role: Literal["error", "ignore"] = "error"
    max_text_chars: int = 65_536
    max_image_bytes: int = 32 * 2**20


def parse_conversation(text: str | None, *, mode: str, place: str, limits: Limits = Limits()) -> Record:
    """Reads the JSON of one conversation.

    Flags that are absent take the released defaults: a user's text carries no loss, an assistant's
    text does, and all three flags of an image are false.

    Args:
        text: JSON list of turns; None as parquet may hold it.
        mode: the learning mode, kept in the record.
        place: file and row, for messages.
    Raises: ValueError naming place, turn and part.
    Source: format of IRG's data/interleave_datasets/multi_think_interleave_t2i_dataset.py.
    """
    if text is None:
        raise ValueError(f"{place}: the conversation is null")
    turns = parse_json(text, "conversation", place=place)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: the conversation must be a list of at least one turn")
    parts = []
    for i, turn in enumerate(turns):
        parts += _parse_turn(turn, f"{place}, turn {i}", limits)
    check_targets(parts, place=place)
    return Record(tuple(parts), mode, place)


def parse_json(text: str | bytes, what: str, *, place: str) -> Any:
    """The value of a JSON text; `what` names it. Raises: ValueError naming `place`."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the {what} is not JSON ({error})") from error


def text_part(text: Any, *, need_loss: bool, place: str, limits: Limits) -> TextPart:
    """A text as it came from a file. Raises: ValueError naming `place` if there is none to train on."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: a text's content must be a string, not {type(text).__name__}")
    if len(text) > limits.max_text_chars:
        raise ValueError(f"{place}: text of {len(text)} characters is over max_text_chars "
                         f"{limits.max_text_chars}")
    if not text.strip():
        raise ValueError(f"{place}: the text is empty; leave the part out, or the record")
    try:
        text.encode()  # JSON may hold half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: the text is not Unicode ({error.reason})") from error
    return TextPart(text, need_loss, place)


def image_part(data: Any, *, place: str, limits: Limits, need_loss: bool = False, need_vae: bool = False,
               need_vit: bool = False) -> ImagePart:
    """An encoded image as it came from a file, its pixels unread.

    Raises: ValueError naming `place` if it is not bytes, empty or too large.
    """
    if not isinstance(data, bytes):
        raise ValueError(f"{place}: an image must be bytes, not {type(data).__name__}")
    if not data:
        raise ValueError(f"{place}: the image is empty")
    if len(data) > limits.max_image_bytes:
        raise ValueError(f"{place}: encoded image of {len(data)} bytes is over max_image_bytes "
                         f"{limits.max_image_bytes}")
    return ImagePart(data, need_loss, need_vae, need_vit, place)


def check_targets(parts: Sequence[TextPart | ImagePart], *, place: str) -> None:
    """Raises: ValueError naming `place` if no part is a target."""
    if not any(part.need_loss for part in parts):
        raise ValueError(f"{place}: no part has need_loss, so there is nothing to learn; set it, or leave the "
                         "record out")


def _parse_turn(turn: Any, place: str, limits: Limits) -> list[TextPart | ImagePart]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise ValueError(f"{place}: a turn must be an object with a role and a content")
    role, content = turn["role"], turn["content"]
    if role == "user":
        if not isinstance(content, str):
            raise ValueError(f"{place}: a user's content must be a string, not "
                             f"{type(content).__name__}; images go into an assistant's list")
        return [_parse_text(turn, False, place, limits)]
    if role == "assistant":
        if not isinstance(content, list):
            raise ValueError(f"{place}: an assistant's content must be a list of parts, not "
                             f"{type(content).__name__}")
        return [_parse_part(part, f"{place}, part {i}", limits) for i, part in enumerate(content)]
    if limits.unknown_role == "ignore":
        return []
    raise ValueError(f"{place}: unknown role {role!r}; use user or assistant, or set unknown_role "
                     "to 'ignore' to leave such turns out")


def _parse_part(part: Any, place: str, limits: Limits) -> TextPart | ImagePart:
    if not isinstance(part, dict) or "type" not in part or "content" not in part:
        raise ValueError(f"{place}: a part must be an object with a type and a content")
    if part["type"] == "text":
        return _parse_text(part, True, place, limits)
    if part["type"] == "image":
        return _parse_image(part, place, limits)
    raise ValueError(f"{place}: unknown part type {part['type']!r}; use text or image")


def _parse_text(part: dict[str, Any], need_loss: bool, place: str, limits: Limits) -> TextPart:
    flags = _flags(part, place, need_loss=need_loss)
    return text_part(part["content"], place=place, limits=limits, **flags)


def _parse_image(part: dict[str, Any], place: str, limits: Limits) -> ImagePart:
    content = part["content"]
    if not isinstance(content, str):
        raise ValueError(f"{place}: an image's content must be a base64 string, not "
                         f"{type(content).__name__}")
    if len(content) > limits.max_image_bytes * 4 // 3 + 4:
        raise ValueError(f"{place}: encoded image of about {len(content) * 3 // 4} bytes is over "
                         f"max_image_bytes {limits.max_image_bytes}")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{place}: the image is not base64 ({error})") from error
    flags = _flags(part, place, need_loss=False, need_vae=False, need_vit=False)
    return image_part(data, place=place, limits=limits, **flags)


def _flags(part: dict[str, Any], place: str, **defaults: bool) -> dict[str, bool]:
    # A misspelt flag would silently change what is learned, so the whole need_ namespace is ours.
    for key in part:
        if key.startswith("need_") and key not in defaults:
            raise ValueError(f"{place}: unknown flag {key!r}; use {', '.join(defaults)}")
    flags = {name: part.get(name, default) for name, default in defaults.items()}
    for name, value in flags.items():
        if value not in (True, False):
            raise ValueError(f"{place}: {name} is {value!r}; use true or false")
    return {name: bool(value) for name, value in flags.items()}
