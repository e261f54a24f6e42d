"""The shapes benchmark: held-out prompts, and the verdict on a picture from its pixels alone."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.shapes.detect import Detection
from data_pipelines.shapes.scene import Request
from data_pipelines.shapes.score import score
from irg_jax.evaluation.files import parse

FIELDS = ("id", "category", "prompt", "request")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A prompt and what it asks for; `id` also names image files."""

    id: str
    category: str
    prompt: str
    request: Request


def read_prompts(path: str | pathlib.Path, *, limit: int | None = None) -> tuple[HeldOut, ...]:
    """The first `limit` prompts of a `prompts_heldout.jsonl`, or all.

    Raises: ValueError naming file, line and field.
    """
    try:
        with pathlib.Path(path).open(encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error}); build the data set, or "
                         "name its prompts_heldout.jsonl") from error
    prompts = tuple(_parse(line, f"{path}, line {number}") for number, line
                    in enumerate(lines[:limit], 1))
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    ids = [prompt.id for prompt in prompts]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice:
        raise ValueError(f"{path}: the id {twice!r} occurs twice; give every prompt one of its own")
    return prompts


def digest_prompts(prompts: Sequence[HeldOut]) -> str:
    """sha256 of all that is asked."""
    return hashlib.sha256(repr(tuple(prompts)).encode()).hexdigest()


def make_result(prompt: HeldOut, *, system: str, image: np.ndarray, text: str, file: str
                ) -> dict[str, Any]:
    """The line of results.jsonl on a picture uint8 [H, H, 3]; `file` is its path in the folder."""
    verdict = score(prompt.request, image)
    return {"id": prompt.id, "category": prompt.category, "prompt": prompt.prompt,
            "system": system, "correct": bool(verdict.correct), "reasons": list(verdict.reasons),
            "seen": [_describe(thing) for thing in verdict.detections], "image": file,
            "text": text}


def _describe(thing: Detection) -> str:
    """striped red circle (0.31, 0.52)."""
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{texture}{thing.colour} {thing.shape} ({thing.x:.2f}, {thing.y:.2f})"


def _parse(line: str, place: str) -> HeldOut:
    record = parse(line.encode(), place)
    if set(record) != set(FIELDS):
        raise ValueError(f"{place}: must be an object with the fields {', '.join(FIELDS)}")
    for name in FIELDS[:3]:
        if not isinstance(record[name], str) or not record[name]:
            raise ValueError(f"{place}: field {name!r} must be a text, not {record[name]!r}")
    if not re.fullmatch(r"[\w-]{1,80}", record["id"], re.ASCII):
        raise ValueError(f"{place}: field 'id' is {record['id']!r}; it names a file: use letters, "
                         "digits, - and _")
    try:
        request = Request.from_json(record["request"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if record["category"] != request.category:
        raise ValueError(f"{place}: field 'category' is {record['category']!r}, its request's is "
                         f"{request.category!r}")
    return HeldOut(record["id"], record["category"], record["prompt"], request)
