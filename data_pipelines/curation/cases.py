"""Prompts, and pairs of prompt and image, as they are read from a file.

    a.txt       one prompt a line
    a.jsonl     {"prompt": "a cat", "id": "cat-1", "image": "cats/1.jpg", "licence": "CC0-1.0", "source": "...",
                 "request": {...}}

All but the prompt may be missing: without an id a case has the number of its line, and `licence` may be the
config's for all. An image's path begins at the file's folder and leads nowhere outside it. `source` is kept in
the provenance as it is. A `request` says what a prompt of the shapes world asks for.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data_pipelines.config import nearest
from data_pipelines.curation.filters import Rules, Seen, check_prompt, check_side, check_unicode
from data_pipelines.curation.material import MAX_IMAGE_BYTES, Case, Picture, Rejected, Rejection
from data_pipelines.jobs import default_workers
from data_pipelines.lines import Folder

FIELDS = ("prompt", "id", "image", "licence", "source", "request")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Line(NamedTuple):
    """A case as it was read, before its image is."""

    case: Case
    image: str = ""     # path from the file's folder
    place: str = ""


class Screened(NamedTuple):
    """Cases that are worth asking for, those that are not, and what was seen of the former."""

    cases: list[Case]
    rejections: list[Rejection]
    seen: Seen


def read_lines(path: str | pathlib.Path, *, licence: str = "") -> list[Line]:
    """All lines that are not empty.

    Args: licence of lines that name none.
    Raises: ValueError naming file, line and field of whatever is not as it should be.
    """
    path = pathlib.Path(path)
    try:
        texts = path.read_bytes().decode("utf-8-sig").split("\n")    # with or without the mark of some editors
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error})") from error
    read = _read_json if path.suffix == ".jsonl" else _read_text
    lines = [read(text.strip(), number, path, licence) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompt")
    known: dict[str, str] = {}
    for line in lines:
        if known.setdefault(line.case.id, line.place) != line.place:
            raise ValueError(f"{line.place}: the id {line.case.id!r} is that of {known[line.case.id]}; give "
                             "every line its own, or none")
    return lines


def screen(lines: Sequence[Line], *, folder: str | pathlib.Path, rules: Rules) -> Screened:
    """What can be told before anything is asked: broken images, duplicates, lengths, what the hook refuses.

    Args: folder that the images' paths begin at.
    """
    seen, cases, rejections = Seen(rules.config.near_bits), [], []
    for line, image in zip(lines, _read_images(lines, Folder(folder), rules)):
        case = line.case
        cause, told = check_prompt(case.prompt, rules.config), ""
        if not cause and isinstance(image, Rejected):
            cause, told = image.cause, image.told
        cause = cause or seen.check_prompt(case.prompt)
        is_pair = isinstance(image, Picture)
        if not cause and is_pair:
            cause = seen.check_image(image.sha256, image.look.fingerprint)
        cause = cause or rules.judge_safety(case.prompt, (), ())
        if cause:    # and what is like it may still be taken
            rejections.append(Rejection(case.id, "case", cause, told))
            continue
        seen.take_prompt(case.prompt)
        if is_pair:
            seen.take_image(image.sha256, image.look.fingerprint)
            # What was seen of it is 4 KiB, and there may be a million.
            case = dataclasses.replace(case, image=dataclasses.replace(image, known=None))
        cases.append(case)
    return Screened(cases, rejections, seen)


def _read_images(lines: Iterable[Line], folder: Folder, rules: Rules
                 ) -> Iterator[Picture | Rejected | None]:
    """Of each line the picture, why it has none, or None if it names none."""

    def read(line: Line) -> Picture | Rejected | None:
        if not line.image:
            return None
        try:
            picture = read_picture(folder, line.image, where=line.place)
            if cause := check_side(picture.look, rules.config):
                return Rejected(cause)
            return picture
        except Rejected as rejected:
            return rejected

    with concurrent.futures.ThreadPoolExecutor(default_workers()) as pool:   # Pillow releases Python's lock
        yield from pool.map(read, lines)


def read_picture(folder: Folder, name: str, *, where: str) -> Picture:
    """An image below a folder. Raises: Rejected if there is none, or it does not decode."""
    try:
        data = folder.read(name, where=where, limit=MAX_IMAGE_BYTES)
    except ValueError as error:
        raise Rejected("broken_image", str(error)) from error
    return Picture.read(folder.path(name), data)


def _read_text(text: str, number: int, path: pathlib.Path, licence: str) -> Line:
    return _make({"prompt": text}, number, path, licence)


def _read_json(text: str, number: int, path: pathlib.Path, licence: str) -> Line:
    place = f"{path}, line {number}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a line is a JSON object like {{\"prompt\": \"a cat\"}}, not {text[:50]!r}")
    for key in value:
        if key not in FIELDS:
            raise ValueError(f"{place}: unknown field {key!r}{nearest(key, FIELDS)}")
    return _make(value, number, path, licence)


def _make(value: dict[str, Any], number: int, path: pathlib.Path, licence: str) -> Line:
    place = f"{path}, line {number}"
    texts = {"id": f"{number:06d}", "licence": licence, "image": "", "source": ""} | {
        key: field for key, field in value.items() if field is not None and key != "request"}
    for key, field in texts.items():
        if not isinstance(field, str):
            raise ValueError(f"{place}: field {key!r} is {field!r}; it is a text")
        if key != "prompt" and check_unicode(field):    # such a prompt is rejected, and counted
            raise ValueError(f"{place}: field {key!r} is not Unicode (half of a surrogate pair)")
    if not texts.get("prompt", "").strip():
        raise ValueError(f"{place}: lacks the field 'prompt' with a text")
    if not _ID.fullmatch(texts["id"]):
        raise ValueError(f"{place}: the id {texts['id'][:80]!r} cannot name a file; use letters, digits, '_', "
                         "'-' and '.'")
    if not texts["licence"]:
        raise ValueError(f"{place}: no licence is known; name it in the field 'licence', or for all lines in "
                         "the config's licence")
    request = value.get("request")
    if request is not None and not isinstance(request, dict):
        raise ValueError(f"{place}: field 'request' is {request!r}; it is a JSON object")
    source = {"file": path.name, "line": number} | ({"source": texts["source"]} if texts["source"] else {})
    case = Case(texts["id"], texts["prompt"].strip(), texts["licence"], source, None, request)
    return Line(case, texts["image"], place)
