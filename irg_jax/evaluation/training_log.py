"""Reads what the training of each stage has left behind, finished or still going, and trusts nothing in it.

    RUN/<stage>/metrics.jsonl        one line a logged step: `step`, `time`, and numbers by name
    RUN/<stage>/config.json          optional: the resolved config
    RUN/<stage>/goodput.json         optional: {"seconds": {"training": 812.3}, "goodput": 0.93, "starts": 3}
    RUN/<stage>/events.jsonl         optional: one line an event, {"time", "step", "event", "text"}
    RUN/<stage>/samples/step_*.png   optional: pictures drawn on the way; their texts in step_*.json

A fault in the metrics raises ValueError with file, line and field. Of the optional files what is faulty is left
out, and a note says so.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from irg_jax.evaluation.files import (
    AMOUNT,
    COUNT,
    NUMBER,
    TEXT,
    check,
    is_count,
    is_inside,
    is_number,
    is_text_list,
    parse,
    read_bytes,
    read_image,
)

METRICS = ("time", "loss", "ce", "mse", "learning_rate", "grad_norm", "tokens_per_second",
           "step_seconds", "fill_text", "fill_vit", "fill_latent")   # numbers, or null
MAX_COLUMNS = 400
MAX_SAMPLES = 8               # of a stage
MAX_IMAGE_BYTES = 16 << 20
MAX_JSON_BYTES = 4 << 20
MAX_EVENTS_BYTES = 64 << 20
END_OF_TIME = 253_402_300_800    # the year 10000, in seconds


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture drawn after `step` steps, as PNG; `texts` are (prompt, what was written in each turn)."""

    step: int
    image: bytes
    texts: tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the time of a stage went; `share` is the productive part of it, None if unknown."""

    seconds: Mapping[str, float]
    share: float | None
    starts: int | None


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a run, at `time` in seconds since 1970."""

    time: float | None
    step: int | None
    event: str
    text: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. `metrics[name]` is float64 [lines] by rising step, NaN where a line lacks it.

    `started` is the time of the first line, infinite if there is none yet: then `metrics` is empty.
    """

    name: str
    started: float
    metrics: Mapping[str, np.ndarray]
    samples: tuple[Sample, ...] = ()
    num_samples: int = 0             # those that are not shown included
    goodput: Goodput | None = None
    events: tuple[Event, ...] = ()
    config: Mapping[str, Any] | None = None


def read_stages(folder: pathlib.Path, notes: list[str], *, finished: bool) -> tuple[Stage, ...]:
    """All folders with a metrics.jsonl, by the time of its first line; `notes` takes what is left out.

    Of a finished run every stage<number> must have one, and it must not be empty.
    """
    stages = []
    try:
        places = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); "
                         "is this the folder of a run?") from error
    for place in places:
        expected = finished and re.fullmatch(r"stage\d+", place.name)
        if not expected and not os.path.lexists(place / "metrics.jsonl"):
            continue
        if place.name.isprintable():
            stages.append(_read_stage(place, notes, finished=finished))
        else:
            notes.append(f"the stage {place.name!a} has a name that cannot be shown")
    return tuple(sorted(stages, key=lambda stage: (stage.started, stage.name)))


def read_metrics(path: pathlib.Path, notes: list[str]) -> dict[str, np.ndarray]:
    """Columns of a metrics file by rising step; of a step logged twice the last line counts."""
    return _columns(_read_records(path), path, notes)


def _read_stage(folder: pathlib.Path, notes: list[str], *, finished: bool) -> Stage:
    path = folder / "metrics.jsonl"
    records = _read_records(path)
    if not records and finished:
        raise ValueError(f"{path}: is empty; let the run write at least one line")
    if not records:
        notes.append(f"{path}: holds no step yet")
    samples, num_samples = _read_samples(folder, notes)
    return Stage(folder.name, records[0]["time"] if records else math.inf, _columns(records, path, notes),
                 samples, num_samples, _read_goodput(folder, notes), _read_events(folder, notes),
                 _read_object(folder, "config.json", notes))


def _read_records(path: pathlib.Path) -> list[dict]:
    """All lines in file order. A last one that has no end and is no JSON is still being written."""
    raw = read_bytes(path)
    lines = raw.splitlines()
    if lines and not raw.endswith(b"\n") and _is_torn(lines[-1]):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        record = parse(line, place, finite=False)
        for name in ("step", "time"):
            if _is_not_finite(record.get(name)):
                raise ValueError(f"{place}: field {name!r} is {record[name]}, not a finite number")
        known = [name for name in METRICS if record.get(name) is not None and not _is_not_finite(record[name])]
        check(record, {"step": COUNT, "time": NUMBER} | dict.fromkeys(known, NUMBER), place, extra=True)
        records.append(record)
    return records


def _columns(records: Sequence[dict], path: pathlib.Path, notes: list[str]) -> dict[str, np.ndarray]:
    by_step = {record["step"]: record for record in records}
    lines = [by_step[step] for step in sorted(by_step)]
    names = list(dict.fromkeys(["step", *(name for line in lines for name in line)])) if lines else []
    if len(names) > MAX_COLUMNS:
        notes.append(f"{path}: {len(names) - MAX_COLUMNS} of {len(names)} metrics are left out")
    not_finite = sum(_is_not_finite(value) for line in lines for value in line.values())
    if not_finite:
        notes.append(f"{path}: {not_finite} values that are not finite are left out")
    columns = {}
    for name in names[:MAX_COLUMNS]:
        values = (line.get(name) for line in lines)
        columns[name] = np.array([value if is_number(value) else math.nan for value in values], float)
    return {name: column for name, column in columns.items() if np.isfinite(column).any()}


def _read_samples(folder: pathlib.Path, notes: list[str]) -> tuple[tuple[Sample, ...], int]:
    """At most MAX_SAMPLES, spread evenly, the first and the last among them; and how many there are."""
    try:
        names = os.listdir(folder / "samples")
    except OSError:
        return (), 0
    steps = sorted(int(match[1]) for name in names if (match := _SAMPLE.fullmatch(name))
                   and name == f"step_{int(match[1]):06d}.png")
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), MAX_SAMPLES)).round().astype(int)
    samples = []
    for step in (steps[index] for index in chosen):
        path = folder / "samples" / f"step_{step:06d}.png"
        try:
            if not is_inside(path, folder):
                raise ValueError(f"{path}: leads out of the folder of its stage")
            image = read_image(path, limit=MAX_IMAGE_BYTES)
        except ValueError as error:
            notes.append(str(error))
            continue
        samples.append(Sample(step, image, _read_texts(folder, f"samples/{path.stem}.json", notes)))
    return tuple(samples), len(steps)


def _read_texts(folder: pathlib.Path, name: str, notes: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    record = _read_object(folder, name, notes) or {}
    prompts, turns = record.get("prompts") or [], record.get("turns") or []
    sound = is_text_list(prompts) and isinstance(turns, list) and all(
        isinstance(several, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("text", ""), str) for turn in several)
        for several in turns)
    if not sound:
        notes.append(f"{folder / name}: prompts must be strings, and turns lists of objects with a text")
        return ()
    return tuple((prompt or "", tuple(turn.get("text", "") for turn in several))
                 for prompt, several in itertools.zip_longest(prompts, turns, fillvalue=())
                 if prompt or several)


def _read_goodput(folder: pathlib.Path, notes: list[str]) -> Goodput | None:
    record, path = _read_object(folder, "goodput.json", notes), folder / "goodput.json"
    if record is None:
        return None
    seconds, share, starts = record.get("seconds"), record.get("goodput"), record.get("starts")
    if not isinstance(seconds, dict):
        notes.append(f"{path}: field 'seconds' must be an object of names and seconds")
        return None
    sound = {name: float(value) for name, value in seconds.items() if AMOUNT.accepts(value)}
    wrong = [name for name in seconds if name not in sound]
    if wrong:
        names = ", ".join(name[:40] for name in wrong[:10])
        notes.append(f"{path}: seconds of {names} must be a number, 0 or more")
    if share is not None and not (is_number(share) and 0 <= share <= 1):
        notes.append(f"{path}: field 'goodput' must be a number from 0 to 1")
        share = None
    if starts is not None and not is_count(starts):
        notes.append(f"{path}: field 'starts' must be a whole number, 0 or more")
        starts = None
    return Goodput(sound, share, starts)


def _read_events(folder: pathlib.Path, notes: list[str]) -> tuple[Event, ...]:
    """Events in file order. A kill may have torn the last line: that is no fault."""
    lines = (_read_optional(folder, "events.jsonl", notes, limit=MAX_EVENTS_BYTES) or b"").splitlines()
    if lines and _is_torn(lines[-1]):
        lines.pop()
    events, malformed = [], 0
    for line in filter(bytes.strip, lines):
        try:
            events.append(_parse_event(line))
        except ValueError:
            malformed += 1
    if malformed:
        notes.append(f"{folder / 'events.jsonl'}: {malformed} "
                     f"{'lines are no events' if malformed > 1 else 'line is no event'}, and left out")
    return tuple(events)


def _parse_event(line: bytes) -> Event:
    record = parse(line, "event")
    given = {name: kind for name, kind in _EVENT.items() if record.get(name) is not None}
    check(record, {"event": TEXT} | given, "event", extra=True)
    time = record.get("time")
    if time is not None and time >= END_OF_TIME:
        raise ValueError(f"event: field 'time' is {time}, which no calendar knows")
    return Event(time, record.get("step"), record["event"], record.get("text") or "")


def _read_object(folder: pathlib.Path, name: str, notes: list[str]) -> dict[str, Any] | None:
    raw = _read_optional(folder, name, notes, limit=MAX_JSON_BYTES)
    try:
        return None if raw is None else parse(raw, str(folder / name), finite=False)
    except ValueError as error:
        notes.append(str(error))
        return None


def _read_optional(folder: pathlib.Path, name: str, notes: list[str], *, limit: int) -> bytes | None:
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        if not is_inside(path, folder):
            raise ValueError(f"{path}: leads out of the folder of its stage")
        return read_bytes(path, limit=limit)
    except ValueError as error:
        notes.append(str(error))
        return None


def _is_torn(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


_SAMPLE = re.compile(r"step_([0-9]{6,15})\.png")
_EVENT = {"time": AMOUNT, "step": COUNT, "event": TEXT, "text": TEXT}
