"""Reads a run folder, and trusts nothing in it.

    RUN/<stage>/...                what the training of a stage left (`training_log.py`)
    RUN/eval/shapes/manifest.json  optional, with all of eval/shapes: what was evaluated, and how; where only
                                   progress.json is there, the evaluation is under way and left out
    RUN/eval/shapes/results.jsonl  one line a (prompt, system)
    RUN/eval/shapes/images/*.png   what was drawn
    RUN/timings.json               optional: {"stage1": seconds, "peak_rss_gib": {"stage1": gib}}

A fault raises ValueError with the file, the line and the field.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from irg_jax.evaluation.files import (
    AMOUNT,
    COUNT,
    FLAG,
    OBJECT,
    TEXT,
    TEXTS,
    check,
    is_inside,
    parse,
    read_bytes,
    read_lines,
)
from irg_jax.evaluation.recording import MANIFEST, PROGRESS, RESULTS
from irg_jax.evaluation.training_log import Stage, read_stages

SYSTEMS = ("base", "self_cot", "turn1", "turn2")
MORE_TURNS = tuple(f"turn{number}" for number in range(3, 10))   # may be there, in this order


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
    """Everything a report needs. Without an evaluation there is no manifest, and no result.

    `notes` are sentences on what was found but is left out; paths in them begin at the run's folder.
    """

    name: str
    manifest: Manifest | None
    results: tuple[Result, ...]
    stages: tuple[Stage, ...]
    timings: Timings
    notes: tuple[str, ...]


def read_run(folder: str | pathlib.Path) -> Run:
    """The whole run folder, checked. Raises ValueError naming file, line and field."""
    folder, notes = pathlib.Path(folder), []
    evaluation = folder / "eval" / "shapes"
    manifest, results = None, ()
    if (evaluation / PROGRESS).is_file() and not os.path.lexists(evaluation / MANIFEST):
        notes.append(f"{evaluation}: is under way, and left out; let the evaluation finish, then report")
    elif os.path.lexists(evaluation):
        manifest = read_manifest(evaluation / MANIFEST)
        results = read_results(evaluation / RESULTS)
        drawn = len({result.id for result in results})
        if drawn != manifest.prompts:
            raise ValueError(f"{evaluation / RESULTS}: holds {drawn} prompts, "
                             f"but {MANIFEST} promises {manifest.prompts}; "
                             "let the evaluation finish, then report")
    stages = read_stages(folder, notes, finished=manifest is not None)
    if manifest is None and not stages:
        raise ValueError(f"{folder}: holds neither a stage (a folder with metrics.jsonl) nor an evaluation "
                         "(eval/shapes); name the folder that training got as --workdir")
    name = folder.resolve().name
    timings = read_timings(folder / "timings.json")
    return Run(name if name.isprintable() else "", manifest, results, stages, timings,
               tuple(note.replace(f"{folder}/", "") for note in notes))


def read_manifest(path: pathlib.Path) -> Manifest:
    """The manifest of an evaluation; unknown fields are refused."""
    record = parse(read_bytes(path), str(path))
    check(record, _MANIFEST, str(path))
    if record["prompts"] == 0:
        raise ValueError(f"{path}: field 'prompts' is 0; evaluate at least one prompt")
    return Manifest(**record)


def read_results(path: pathlib.Path) -> tuple[Result, ...]:
    """All result lines in file order; no (prompt, system) twice, no image outside the folder."""
    results, first = {}, {}
    for place, record in read_lines(path):
        check(record, _RESULT, place)
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


def read_timings(path: pathlib.Path) -> Timings:
    """Seconds a step, and `peak_rss_gib` a step; the file may be absent."""
    if not path.exists():
        return Timings({}, {})
    seconds = parse(read_bytes(path), str(path))
    memory = seconds.pop("peak_rss_gib", {})
    check({"peak_rss_gib": memory}, {"peak_rss_gib": OBJECT}, str(path))
    for values in (seconds, memory):
        check(values, dict.fromkeys(values, AMOUNT), str(path))
    return Timings(seconds, memory)


_RESULT = {"id": TEXT, "category": TEXT, "prompt": TEXT, "system": TEXT, "correct": FLAG,
           "reasons": TEXTS, "seen": TEXTS, "image": TEXT, "text": TEXT}
_MANIFEST = {"prompts": COUNT, "seed": COUNT, "checkpoints": OBJECT, "settings": OBJECT,
             "versions": OBJECT, "command": TEXT, "seconds": AMOUNT, "peak_rss_gib": AMOUNT}


def _resolve_image(folder: pathlib.Path, relative: str, place: str) -> pathlib.Path:
    """The file an image path means. Followed, so that neither `..` nor a link leads outside."""
    path = folder / relative
    if not _IMAGE_NAME.fullmatch(relative) or not is_inside(path, folder):
        raise ValueError(f"{place}: field 'image' is {relative[:200]!r}; give the path of a .png "
                         "file inside the folder of the results, relative to it")
    if not path.is_file():
        raise ValueError(f"{place}: field 'image' names {relative!r}, which does not exist")
    return path.resolve()


_IMAGE_NAME = re.compile(r"(?:[\w.-]{1,100}/){0,8}[\w.-]{1,100}\.png", re.ASCII)
