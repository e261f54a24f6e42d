"""Reads a finished run folder, and trusts nothing in it.

    RUN/stage1/metrics.jsonl       one line a logged step; so has stage2
    RUN/eval/shapes/manifest.json  what was evaluated, and how
    RUN/eval/shapes/results.jsonl  one line a (prompt, system)
    RUN/eval/shapes/images/*.png   what was drawn
    RUN/timings.json               optional: {"stage1": seconds, "peak_rss_gib": {"stage1": gib}}

A fault raises ValueError with the file, the line and the field.
"""

import dataclasses
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

SYSTEMS = ("base", "self_cot", "turn1", "turn2")
MORE_TURNS = tuple(f"turn{number}" for number in range(3, 10))   # may be there, in this order
STAGES = ("stage1", "stage2")
METRICS = ("time", "loss", "ce", "mse", "learning_rate", "grad_norm", "tokens_per_second",
           "step_seconds", "fill_text", "fill_vit", "fill_latent")
MAX_IMAGE_SIDE = 4096


@dataclasses.dataclass(frozen=True)
class Result:
    """One prompt drawn by one system, and the detector's verdict. `text` may be empty."""

    id: str
    category: str
    prompt: str
    system: str
    correct: bool
    reasons: tuple[str, ...]
    seen: tuple[str, ...]
    image: pathlib.Path
    text: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """How the evaluation was run; `prompts` counts prompts, not results."""

    prompts: int
    seed: int
    checkpoints: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    command: str
    seconds: float
    peak_rss_gib: float


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds and peak memory of each step of the job, by the step's name; empty if unknown."""

    seconds: Mapping[str, float]
    peak_rss_gib: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a report needs. `metrics[stage][name]` is float64 [lines], `step` among them."""

    manifest: Manifest
    results: tuple[Result, ...]
    metrics: Mapping[str, Mapping[str, np.ndarray]]
    timings: Timings


def read_run(folder: str | pathlib.Path) -> Run:
    """The whole run folder, checked. Raises ValueError naming file, line and field."""
    folder = pathlib.Path(folder)
    evaluation = folder / "eval" / "shapes"
    manifest = read_manifest(evaluation / "manifest.json")
    results = read_results(evaluation / "results.jsonl")
    drawn = len({result.id for result in results})
    if drawn != manifest.prompts:
        raise ValueError(f"{evaluation / 'results.jsonl'}: holds {drawn} prompts, "
                         f"but manifest.json promises {manifest.prompts}; "
                         "let the evaluation finish, then report")
    metrics = {stage: read_metrics(folder / stage / "metrics.jsonl") for stage in STAGES}
    return Run(manifest, results, metrics, read_timings(folder / "timings.json"))


def read_manifest(path: pathlib.Path) -> Manifest:
    """The manifest of an evaluation; unknown fields are refused."""
    record = _parse(_read_bytes(path), str(path))
    _check(record, _MANIFEST, str(path))
    if record["prompts"] == 0:
        raise ValueError(f"{path}: field 'prompts' is 0; evaluate at least one prompt")
    return Manifest(**record)


def read_results(path: pathlib.Path) -> tuple[Result, ...]:
    """All result lines in file order; no (prompt, system) twice, no image outside the folder."""
    results, first = {}, {}
    for place, record in _read_lines(path):
        _check(record, _RESULT, place)
        record |= {"reasons": tuple(record["reasons"]), "seen": tuple(record["seen"]),
                   "image": _resolve_image(path.parent, record["image"], place)}
        result = Result(**record)
        if result.system not in SYSTEMS + MORE_TURNS:
            raise ValueError(f"{place}: field 'system' is {result.system!r}; "
                             f"use one of {', '.join(SYSTEMS + MORE_TURNS)}")
        if result.category in ("", "overall"):
            raise ValueError(f"{place}: field 'category' is {result.category!r}; name a category")
        if (result.id, result.system) in results:
            raise ValueError(f"{place}: prompt {result.id!r} by {result.system} occurs twice")
        known = first.setdefault(result.id, result)
        if (known.category, known.prompt) != (result.category, result.prompt):
            raise ValueError(f"{place}: prompt {result.id!r} has another text or category than on "
                             "its first line; give every prompt an id of its own")
        results[result.id, result.system] = result
    return tuple(results.values())


def read_metrics(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Columns of a metrics file by rising step; of a step logged twice the last line counts."""
    lines = {}
    for place, record in _read_lines(path):
        _check(record, _METRICS, place, extra=True)
        lines[record["step"]] = record
    steps = sorted(lines)
    columns = {name: np.array([lines[step][name] for step in steps], float) for name in METRICS}
    return {"step": np.array(steps, float), **columns}


def read_timings(path: pathlib.Path) -> Timings:
    """Seconds a step, and `peak_rss_gib` a step; the file may be absent."""
    if not path.exists():
        return Timings({}, {})
    seconds = _parse(_read_bytes(path), str(path))
    memory = seconds.pop("peak_rss_gib", {})
    _check({"peak_rss_gib": memory}, {"peak_rss_gib": _OBJECT}, str(path))
    for values in (seconds, memory):
        _check(values, dict.fromkeys(values, _AMOUNT), str(path))
    return Timings(seconds, memory)


def read_image(path: pathlib.Path) -> bytes:
    """The bytes of a PNG file that decodes; ValueError for anything else."""
    raw = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            if max(image.size) > MAX_IMAGE_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels are too large")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable PNG image ({error}); draw it again") from error
    return raw


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a JSON value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Comparing works for integers too large for a float, converting them does not.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_TEXTS = _Kind("a list of strings", _is_text_list)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = _Kind("a number", _is_number)
_AMOUNT = _Kind("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
_COUNT = _Kind("a whole number, 0 or more", _is_count)
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))

_RESULT = {"id": _TEXT, "category": _TEXT, "prompt": _TEXT, "system": _TEXT, "correct": _FLAG,
           "reasons": _TEXTS, "seen": _TEXTS, "image": _TEXT, "text": _TEXT}
_MANIFEST = {"prompts": _COUNT, "seed": _COUNT, "checkpoints": _OBJECT, "settings": _OBJECT,
             "versions": _OBJECT, "command": _TEXT, "seconds": _AMOUNT, "peak_rss_gib": _AMOUNT}
_METRICS = {"step": _COUNT} | dict.fromkeys(METRICS, _NUMBER)


def _check(record: dict, schema: Mapping[str, _Kind], place: str, *, extra: bool = False) -> None:
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


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); "
                         "is this the folder of a finished run?") from error


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line; an empty file is an error, for nothing can be said of it."""
    lines = _read_bytes(path).splitlines()
    if not lines:
        raise ValueError(f"{path}: is empty; let the run write at least one line")
    for number, line in enumerate(lines, 1):
        yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _parse(raw: bytes, place: str) -> dict:
    try:
        value = json.loads(raw, parse_constant=_parse_finite, parse_float=_parse_finite)
        # Half a surrogate pair is legal as a JSON escape but cannot be written to any file again.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be a JSON object, not {str(value)[:60]!r}")
    return value


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _resolve_image(folder: pathlib.Path, relative: str, place: str) -> pathlib.Path:
    """The file an image path means. Resolved, so that neither `..` nor a link leads outside."""
    path = (folder / relative).resolve() if _IMAGE_NAME.fullmatch(relative) else None
    if path is None or not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{place}: field 'image' is {relative[:200]!r}; give the path of a .png "
                         "file inside the folder of the results, relative to it")
    if not path.is_file():
        raise ValueError(f"{place}: field 'image' names {relative!r}, which does not exist")
    return path


_IMAGE_NAME = re.compile(r"(?:[\w.-]{1,100}/){0,8}[\w.-]{1,100}\.png", re.ASCII)
