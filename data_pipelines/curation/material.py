"""What a record is made of: a case, pictures, texts, and why something was not taken."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.curation.looks import Look, look_at
from data_pipelines.config import DataConfig
from data_pipelines.endpoints import encode
from data_pipelines.faults import find_cause
from data_pipelines.images import decode_image
from data_pipelines.records import Limits

MAX_PIXELS = DataConfig.max_image_pixels    # of any picture
MAX_IMAGE_BYTES = Limits().max_image_bytes


class Rejected(Exception):
    """A case, or a side of it, cannot be told; `cause` is what is counted, `told` the rest of the story."""

    def __init__(self, cause: str, told: str = ""):
        super().__init__(cause, told)
        self.cause, self.told = cause, told


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An encoded image: its bytes, or the file that holds them, so that many may wait to be written."""

    source: bytes | pathlib.Path
    sha256: str
    known: Look | None = None    # of what was decoded already

    @classmethod
    def drawn(cls, pixels: np.ndarray) -> "Picture":
        """Of uint8 [H, W, 3], as PNG."""
        data = encode(pixels)
        return cls(data, hashlib.sha256(data).hexdigest())

    @classmethod
    def read(cls, path: pathlib.Path, data: bytes) -> "Picture":
        """Of a file and what was read from it. Raises: Rejected if none decodes, or readers would refuse it."""
        if len(data) > MAX_IMAGE_BYTES:
            raise Rejected("large_image", f"{path}: {len(data)} bytes")
        try:
            pixels = decode_image(data, where=str(path), max_pixels=MAX_PIXELS)
        except ValueError as error:
            cause = "large_image" if find_cause(str(error)) == "size" else "broken_image"
            raise Rejected(cause, str(error)) from error
        return cls(path, hashlib.sha256(data).hexdigest(), look_at(pixels))

    @property
    def data(self) -> bytes:
        """The encoded bytes. Raises: ValueError if the file is no longer what it was."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            data = self.source.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.source}: the image cannot be read any more ({error}); restore it and run "
                             "the same command again") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.source}: the image was changed while records were made of it; run the "
                             "same command again")
        return data

    @property
    def look(self) -> Look:
        """Its size, similarity and fingerprint."""
        return self.known or look_at(self.pixels)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return decode_image(self.data, where=str(self.source)[:100], max_pixels=MAX_PIXELS)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A prompt, perhaps with its picture: what up to six records are made from."""

    id: str                                   # letters, digits, ".", "_", "-"; also the name of files
    prompt: str
    licence: str
    source: Mapping[str, Any]                 # where the prompt comes from, as JSON
    image: Picture | None = None              # a prompt-image pair's
    request: Mapping[str, Any] | None = None  # of the shapes world: what the prompt asks for


class Round(NamedTuple):
    """What the base model thought and drew first."""

    thought: str             # in think tags, as it wrote it
    image: Picture
    source: Mapping[str, Any]


class Words(NamedTuple):
    """What every record of a data set says alike; without a system prompt none opens them."""

    system_prompt: str
    how_to_think: str
    how_to_improve: str


class Material(NamedTuple):
    """All that the records of one case are told from; a side that is not told lacks its texts."""

    words: Words
    prompt: str
    image: Picture           # what was to be drawn
    thought: str = ""        # that leads to it
    first: Round | None = None
    reflection: str = ""     # that leads from the first picture to the image


class Rejection(NamedTuple):
    """What was not taken and why: the whole case, or its three initial or improving modes."""

    id: str
    what: str                # "case", "initial" or "improving"
    cause: str
    told: str = ""

