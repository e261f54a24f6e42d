"""Which training checkpoints a folder holds, by names and sizes, and names as they are printed.

It imports nothing that takes long.
"""

import contextlib
import datetime
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from irg_jax.checkpoints.seals import SEAL

FOLDER = "checkpoints"   # the one of `bundle`, which imports Orbax
SEALED, NOT_SEALED, SET_ASIDE, UNDER_WAY = "sealed", "not sealed", "set aside", "under way"
_NAME = re.compile(r"(0|[1-9]\d*)(?:(\.bad(?:\.\d+)?)|(\.orbax-checkpoint-tmp.*))?", re.ASCII)


class Step(NamedTuple):
    """One step's folder."""

    path: pathlib.Path
    number: int
    standing: str   # SEALED, NOT_SEALED, SET_ASIDE or UNDER_WAY

    @property
    def stage(self) -> str:
        return self.path.parent.parent.name

    @property
    def label(self) -> str:
        """Its number; set aside, the name that tells it from others of the number."""
        return self.path.name if self.standing == SET_ASIDE else str(self.number)

    def saved(self) -> datetime.datetime:
        """Local time at which its save ended, as Orbax noted it; else that of the folder's last change."""
        try:   # copies of a folder have other times than the folder
            note = json.loads((self.path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
            return datetime.datetime.fromtimestamp(note["commit_timestamp_nsecs"] / 1e9)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return datetime.datetime.fromtimestamp(self.path.stat().st_mtime)

    def size(self) -> int:
        return measure(self.path)


def find_step(folder: pathlib.Path) -> Step | None:
    """The step whose folder this is; None if it is no step's."""
    match = _NAME.fullmatch(folder.name)
    if match is None or folder.parent.name != FOLDER or not folder.is_dir():
        return None
    number, bad, partial = match.groups()
    standing = SET_ASIDE if bad else UNDER_WAY if partial else None
    return Step(folder, int(number), standing or (SEALED if (folder / SEAL).exists() else NOT_SEALED))


def find_stages(folder: pathlib.Path) -> list[pathlib.Path]:
    """The stages of a run's folder, a stage's own, or that of its checkpoints.

    Raises: ValueError if there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    if (folder / FOLDER).is_dir():
        return [folder]
    if folder.name == FOLDER:
        return [folder.parent]
    stages = sorted(path for path in folder.iterdir() if (path / FOLDER).is_dir())
    if not stages:
        raise ValueError(f"{str(folder)!r} holds no checkpoints; give a run, or a stage of it, like RUN/stage1")
    return stages


def list_steps(stage: pathlib.Path) -> list[Step]:
    """All steps of a stage, whatever became of them; the newest last."""
    found = [step for path in (stage / FOLDER).iterdir() if (step := find_step(path))]
    return sorted(found, key=lambda step: (step.number, step.path.name))


def find_resumed(steps: Iterable[Step]) -> Step | None:
    """The step a resume takes, if it is sound: the newest that is sealed."""
    return max((step for step in steps if step.standing == SEALED), key=lambda step: step.number, default=None)


def measure(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder; those that a training removes meanwhile count nothing."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def printable(text: str) -> str:
    """Names in a damaged file may hold anything, also what a terminal obeys."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
