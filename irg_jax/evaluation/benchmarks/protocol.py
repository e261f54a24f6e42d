"""What a benchmark is: which prompts, how many images of each, under which names, scored how.

No prompts are kept here: a protocol reads the benchmark's own files from a folder that the user brings, and
says where to get them. It counts them, since a number over other prompts is another benchmark's.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from irg_jax.evaluation.files import read_bytes
from irg_jax.evaluation.intervals import Group

MAX_BYTES = 64 * 2**20    # of a file of prompts


class Prompt(NamedTuple):
    """One prompt; `id` is unique, `details` are what layout, judge or score want besides."""

    id: str
    category: str
    text: str
    details: Mapping[str, Any] = {}


class Scoring(NamedTuple):
    """What is counted, and which column is which sum of it: {column: {group: weight}}.

    `shares` [S, P] are what systems got with each prompt, from 0 to 1; None if the scorer does not tell.
    """

    groups: Mapping[str, Group]
    columns: Mapping[str, Mapping[str, float]]
    shares: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One version of a benchmark. A `system` is what drew, `turn2` or `plain`; paths have it for a model."""

    name: str
    version: str
    source: str                          # where the prompts are to be had
    counts: Mapping[str, int]            # prompts of each category; {"": n} if only their number is known
    images: int                          # of each prompt
    formula: str                         # in words
    read: Callable[[pathlib.Path], list[Prompt]]
    paths: Callable[[Prompt, str], tuple[str, ...]]   # of the images by a system, as the official scorer wants
    score: Callable[[Sequence[Prompt], pathlib.Path, Sequence[str]], Scoring]   # of RESULTS/<system>/
    howto: str                           # how the official scorer is run, {official}, {results}, {system}
    beside: Callable[[Prompt, str], dict[str, str]] = lambda prompt, system: {}   # further files: path -> text
    is_percent: bool = False             # as the paper prints it

    @property
    def title(self) -> str:
        return f"{self.name} ({self.version})"

    def prompts(self, folder: str | pathlib.Path) -> list[Prompt]:
        """All prompts, counted. Raises: ValueError if files are missing, broken, or have other counts."""
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder; {self.title} needs {self.source}")
        try:
            prompts = self.read(folder)
        except FileNotFoundError as error:
            raise ValueError(f"{str(folder)!r} lacks {error}; get {self.source}, and give the folder that "
                             "holds it as --data") from error
        found = collections.Counter(prompt.category for prompt in prompts)
        if "" in self.counts:
            found = {"": len(prompts)}
        if dict(found) != dict(self.counts):
            differing = {name or "prompts": (found.get(name, 0), self.counts.get(name, 0))
                         for name in found | self.counts if found.get(name) != self.counts.get(name)}
            told = ", ".join(f"{name}: {has} instead of {wanted}" for name, (has, wanted) in differing.items())
            raise ValueError(f"{str(folder)!r} does not hold the prompts of {self.title} ({told}); get "
                             f"{self.source}")
        twice = [name for name, count in collections.Counter(p.id for p in prompts).items() if count > 1]
        if twice:
            raise ValueError(f"{str(folder)!r}: the prompt {twice[0]!r} occurs twice; get {self.source}")
        return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of all that is asked."""
    told = [[prompt.id, prompt.category, prompt.text] for prompt in prompts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def find(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """The first of the names that exists in the folder. Raises: FileNotFoundError, told by the first name."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(names[0])


def read_json(path: pathlib.Path) -> Any:
    """Any JSON. Raises: ValueError naming the file."""
    try:
        return json.loads(read_bytes(path, limit=MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def read_records(path: pathlib.Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of lines of JSON (.jsonl), each with the fields.

    Raises: ValueError naming the file, the place and the field.
    """
    if path.suffix == ".jsonl":
        raw = read_bytes(path, limit=MAX_BYTES)
        records = [_parse(line, f"{path}, line {number}") for number, line in enumerate(raw.splitlines(), 1)
                   if line.strip()]
    else:
        records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a list of objects, not {str(records)[:60]!r}")
    for number, record in enumerate(records, 1):
        for name, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise ValueError(f"{path}, entry {number}: lacks the field {name!r}, or it is of another kind")
    return records


def read_table(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a heading. Raises: ValueError naming the file."""
    try:
        text = read_bytes(path, limit=MAX_BYTES).decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline=""), restval="", restkey="", strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV file ({error})") from error


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
