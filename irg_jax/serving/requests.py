"""What a request asks for, checked: bodies of OpenAI's form, with IRG's settings beside.

Whatever is wrong with a request is a ValueError that names the field.
"""

import base64
import binascii
import dataclasses
import re
import threading
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from data_pipelines.config import from_config_dict, nearest
from data_pipelines.images import decode_image, resize
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import Conversation, ModeConfig, check_thinking, count_images
from irg_jax.sampling.trajectory import Generator, Given
from irg_jax.serving.config import ServeConfig

T = TypeVar("T")
SEEDS = 2**32
# Of the model and how it draws; the rest of a body is the request's own.
SETTINGS = tuple(field.name for field in dataclasses.fields(ModeConfig)
                 if field.name not in ("understanding_output", "image_shape"))
_OPENING = 1    # the bracket before a text: `max_think_token_n` counts it, as BAGEL does, `max_tokens` does not
_DATA = re.compile(r"data:image/[\w.+-]{1,32};base64,")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one request asks for: `n` trajectories of one conversation, with seeds from `seed` on."""

    conversation: Conversation
    mode: ModeConfig
    given: Given = Given()
    n: int = 1
    seed: int = 0
    stream: bool = False
    model: str = ""
    partial_images: int | None = None   # of earlier turns, streamed; all if None
    turns: bool = False                 # earlier turns are part of the whole answer

    def seed_of(self, index: int) -> int:
        """The seed of one of its trajectories."""
        return (self.seed + index) % SEEDS


@dataclasses.dataclass(frozen=True)
class ImageBody:
    """Fields of /v1/images/generations and edits, beside `SETTINGS`."""

    prompt: str
    image: tuple[str, ...] = ()          # base64, or data: URLs
    n: int = 1
    size: str = "auto"                   # WIDTHxHEIGHT
    seed: int | None = None
    stream: bool = False
    partial_images: int | None = None
    texts: tuple[str | None, ...] = ()   # in place of think texts, null for the model's own
    turns: bool = False
    model: str = ""
    user: str = ""                       # nothing is made of it
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"


@dataclasses.dataclass(frozen=True)
class ChatBody:
    """Fields of /v1/chat/completions; messages are read by `_read_messages`."""

    messages: Any
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    n: Literal[1] = 1
    stream: bool = False
    model: str = ""
    user: str = ""


class Reader:
    """Makes what is wanted of bodies, within the limits of a server."""

    def __init__(self, generator: Generator, config: ServeConfig):
        self._generator, self._config = generator, config
        known = generator.config
        # What is configured is for everybody, whatever others have asked for.
        self._configured = {known.turn1, known.turn2, (known.height, known.width), generator.sizes_seen(None)}
        self._settings: set[Hashable] = set()
        self._lock = threading.Lock()   # bodies are read by several threads

    def read_image_request(self, fields: Mapping[str, Any], random_seed: int, *, is_edit: bool) -> Wanted:
        """A picture: drawn, or edited from those in `image`."""
        given = {name: fields[name] for name in SETTINGS if fields.get(name) is not None}
        body = _convert(ImageBody, {name: fields[name] for name in fields if name not in SETTINGS}, SETTINGS)
        if body.partial_images is not None and body.partial_images < 0:
            raise ValueError(f"field 'partial_images' is {body.partial_images}; it must not be negative")
        if is_edit != bool(body.image):
            raise ValueError("field 'image' is " + ("missing" if is_edit else "for /v1/images/edits alone"))
        if body.n < 1:
            raise ValueError(f"field 'n' is {body.n}; it must be positive")
        self._limit("n", body.n, "max_n")
        self._limit("image", len(body.image), "max_images")
        # An edit is one picture, and a drawing a whole trajectory, unless another is asked for.
        think = given.setdefault("think", not is_edit and bool(self._generator.config.system_prompt))
        turns = given.setdefault("num_turns", self._generator.config.num_turns if think and not is_edit else 1)
        mode = _convert(ModeConfig, given | {"image_shape": _read_size(body.size)})
        if len(body.texts) > (turns if mode.think else 0):
            raise ValueError(f"field 'texts' has {len(body.texts)} texts for {turns} turns with think "
                             f"{mode.think}; leave some out")
        for number, text in enumerate(body.texts):
            if text is not None:
                self._check_text(text, f"texts[{number}]")
        self._check_text(body.prompt, "prompt")
        images = [self._read_image(image, f"image[{number}]") for number, image in enumerate(body.image)]
        return self._checked(Wanted([*images, body.prompt], mode, Given(body.texts), body.n,
                                    _seed(body.seed, random_seed), body.stream, body.model, body.partial_images,
                                    body.turns))

    def read_chat_request(self, fields: Mapping[str, Any], random_seed: int) -> Wanted:
        """A text about what was said and shown."""
        body = _convert(ChatBody, fields)
        length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        mode = _convert(ModeConfig, {
            "understanding_output": True, "max_think_token_n": None if length is None else length + _OPENING,
            "do_sample": None if body.temperature is None else body.temperature > 0,
            "text_temperature": body.temperature or None})
        conversation = self._read_messages(body.messages)
        return self._checked(Wanted(conversation, mode, seed=_seed(body.seed, random_seed), stream=body.stream,
                                    model=body.model))

    def _read_messages(self, messages: Any) -> Conversation:
        """Texts and images in order, whoever said them."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError("field 'messages' is a list of messages, not empty")
        said, images = [], 0
        for number, message in enumerate(messages):
            place = f"messages[{number}]"
            content = message.get("content") if isinstance(message, dict) else None
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, (list, tuple)) or not parts:
                raise ValueError(f"field '{place}.content' is a text or a list of parts, not empty")
            for index, part in enumerate(parts):
                where = f"{place}.content[{index}]"
                match part:
                    case {"type": "text", "text": str(text)}:
                        said.append(self._check_text(text, where))
                    case {"type": "image_url", "image_url": {"url": str(url)}}:
                        images += 1
                        self._limit("messages, images", images, "max_images")
                        said.append(self._read_image(url, where))
                    case _:
                        raise ValueError(f"field '{where}' is none of {{'type': 'text', 'text': ...}} and "
                                         "{'type': 'image_url', 'image_url': {'url': 'data:image/...'}}")
        return said

    def _read_image(self, text: str, where: str) -> np.ndarray:
        """uint8 [H, W, 3] of base64 or a data: URL; what lies elsewhere is never fetched."""
        if re.match(r"[a-zA-Z][\w+.-]*:", text) and not _DATA.match(text):
            raise ValueError(f"field '{where}' is no base64 and no data:image/...;base64 URL; nothing is "
                             "fetched from elsewhere")
        try:
            data = base64.b64decode(_DATA.sub("", text, count=1), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"field '{where}' is not valid base64 ({error})") from error
        return decode_image(data, where=f"field '{where}'", max_pixels=self._config.max_image_pixels)

    def _check_text(self, text: str, where: str) -> str:
        if not text.strip():
            raise ValueError(f"field '{where}' is empty; say something")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"field '{where}' holds half a surrogate pair; send valid Unicode")
        tokenizer = self._generator.tokenizer
        # Counting tokens takes time; no text has so many characters a token.
        self._limit(f"{where}, characters", len(text), "max_tokens", 16)
        tokenizer.reject_control_tokens(text, where=f"field '{where}'")
        self._limit(f"{where}, tokens", len(tokenizer.encode(text)), "max_tokens")
        return text

    def _checked(self, wanted: Wanted) -> Wanted:
        """Of what decides what is compiled, `max_settings` ways are admitted beside the configured ones."""
        mode, config = wanted.mode, self._generator.config
        said = [item for item in wanted.conversation if isinstance(item, str)]
        self._limit("messages, texts", len(said), "max_texts")
        self._limit("prompt, tokens of all", sum(len(self._generator.tokenizer.encode(text)) for text in said),
                    "max_tokens")
        self._limit("num_turns", mode.num_turns, "max_turns")
        self._limit("num_timesteps", mode.num_timesteps or 0, "max_timesteps")
        check_thinking(mode, config)
        length, opening = mode.max_think_token_n, _OPENING if mode.understanding_output else 0
        if length is not None and not opening < length <= config.text.max_length:
            raise ValueError(f"a text of {length - opening} tokens (field 'max_think_token_n', of a chat "
                             "'max_tokens') is asked for; use at least 1, and at most "
                             f"{config.text.max_length - opening}")
        try:
            mode.text(config.text)    # nothing of it is compiled, but it may be out of range
            ways = _find_ways(wanted, config)
        except ValueError as error:
            raise ValueError(f"a field is out of range: {error}") from error
        if mode.image_shape:
            self._generator.check_size(*mode.image_shape)
            ways.add(mode.image_shape)
        ways |= {self._generator.sizes_seen(resize(item, config.vae_transform))
                 for item in wanted.conversation if not isinstance(item, str)}
        with self._lock:
            self._admit(ways - self._configured)
        return wanted

    def _admit(self, settings: set[Hashable]) -> None:
        if len(self._settings | settings) > self._config.max_settings:
            raise ValueError(f"the server has its limit of {self._config.max_settings} ways to draw beside the "
                             "configured ones (max_settings), and compiles no others; leave settings and sizes "
                             "out, or repeat earlier ones")
        self._settings |= settings

    def _limit(self, what: str, value: int, name: str, factor: int = 1) -> None:
        limit = factor * getattr(self._config, name)
        if value > limit:
            raise ValueError(f"field {what!r}: {value} is over the limit of {limit} ({name})")


def _find_ways(wanted: Wanted, config: SamplingConfig) -> set[Hashable]:
    """The settings that a request's images are drawn with. Raises: ValueError for one that is out of range."""
    if wanted.mode.understanding_output:
        return set()
    shown = count_images(wanted.conversation)
    return {wanted.mode.flow(config.flow(shown + number)) for number in range(wanted.mode.num_turns)}


def _convert(cls: type[T], fields: Mapping[str, Any], others: tuple[str, ...] = ()) -> T:
    known = (*(field.name for field in dataclasses.fields(cls)), *others)
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown field {name[:64]!r}{nearest(name[:64], known)}")
    try:
        return from_config_dict(cls, {name: value for name, value in fields.items() if value is not None})
    except ValueError as error:
        raise ValueError(str(error).replace("config field", "field")) from error


def _read_size(text: str) -> tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT; None for "auto"."""
    if text == "auto":
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"field 'size' is {text[:32]!r}; it is WIDTHxHEIGHT or auto")
    return int(match[2]), int(match[1])


def _seed(seed: int | None, random_seed: int) -> int:
    if seed is None:
        return random_seed
    if not 0 <= seed < SEEDS:
        raise ValueError(f"field 'seed' is {seed}; it is from 0 to {SEEDS - 1}")
    return seed
