"""Files of a run, read as if a stranger had written them: JSON, lines of JSON, PNG images.

A fault raises ValueError with the file, the line and the field.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image

MAX_IMAGE_SIDE = 4096


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a JSON value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that fits a float."""
    # Comparing works for integers too large for a float, converting them does not.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_text_list(value: Any) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind("a list of strings", is_text_list)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", is_number)
AMOUNT = Kind("a number, 0 or more", lambda value: is_number(value) and value >= 0)
COUNT = Kind("a whole number, 0 or more", is_count)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def check(record: dict, schema: Mapping[str, Kind], place: str, *, extra: bool = False) -> None:
    """Raises ValueError unless all fields of the schema are there, of their kinds, and (`extra`) no other."""
    missing = [name for name in schema if name not in record]
    unknown = [name for name in record if name not in schema]
    if missing:
        raise ValueError(f"{place}: lacks the field {', '.join(map(repr, missing))}")
    if unknown and not extra:
        raise ValueError(f"{place}: unknown field {', '.join(map(repr, unknown))}; "
                         f"known are {', '.join(schema)}")
    for name, kind in schema.items():
        if not kind.accepts(record[name]):
            raise ValueError(f"{place}: field {name!r} must be {kind.words}, "
                             f"not {str(record[name])[:60]!r}")


def read_bytes(path: pathlib.Path, *, limit: int | None = None) -> bytes:
    """What a regular file of at most `limit` bytes holds; a pipe or a device would never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: cannot be read (it is no regular file)")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"{path}: has {status.st_size:,} bytes, more than the {limit:,} that are read")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); "
                         "is this the folder of a run?") from error


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line; an empty file is an error, for nothing can be said of it."""
    lines = read_bytes(path).splitlines()
    if not lines:
        raise ValueError(f"{path}: is empty; let the run write at least one line")
    for number, line in enumerate(lines, 1):
        yield f"{path}, line {number}", parse(line, f"{path}, line {number}")


def parse(raw: bytes, place: str, *, finite: bool = True) -> dict:
    """A JSON object; `finite` refuses NaN, Infinity and numbers that are too large for a float."""
    hooks = {"parse_constant": _parse_finite, "parse_float": _parse_finite} if finite else {}
    try:
        value = json.loads(raw, **hooks)
        # Half a surrogate pair is legal as a JSON escape but cannot be written to any file again.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be a JSON object, not {str(value)[:60]!r}")
    return value


def read_image(path: pathlib.Path, *, limit: int | None = None) -> bytes:
    """The bytes of a PNG file that decodes; ValueError for anything else."""
    raw = read_bytes(path, limit=limit)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            if max(image.size) > MAX_IMAGE_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels are too large")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable PNG image ({error}); draw it again") from error
    return raw


def is_inside(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether neither `..` nor a link leads from the folder to elsewhere."""
    root, real = os.path.realpath(folder), os.path.realpath(path)
    return pathlib.Path(real).is_relative_to(root)


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
