"""Takes what was gathered, in order: records go to their modes' files, the rest is counted by cause."""

import collections
import contextlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.curation.filters import Seen
from data_pipelines.curation.gathering import CASE, Gathered, tell
from data_pipelines.curation.material import Rejection
from data_pipelines.curation.writing import ModeWriter, Row
from data_pipelines.digests import write_text

REJECTED = "rejected.jsonl"


class Collector:
    """A context: its end completes all files."""

    def __init__(self, folders: Mapping[str, pathlib.Path], *, rows_per_file: int, rows_per_group: int,
                 seen: Seen | None = None, rejections: Iterable[Rejection] = ()):
        """Args:
            folders: of each mode.
            seen: images that came before; without, none is a duplicate.
            rejections: of what was not even asked for.
        """
        self._stack = contextlib.ExitStack()
        self._writers = {mode: self._stack.enter_context(
            ModeWriter(folder, rows_per_file=rows_per_file, rows_per_group=rows_per_group))
            for mode, folder in folders.items()}
        self._seen = seen
        self.rejections = list(rejections)
        self.told = collections.Counter(whole=0, partly=0)    # cases

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def counts(self) -> dict[str, int]:
        """Records of each mode."""
        return {mode: writer.count for mode, writer in self._writers.items()}

    @property
    def causes(self) -> dict[str, int]:
        """Rejections by cause."""
        return dict(sorted(collections.Counter(one.cause for one in self.rejections).items()))

    def add(self, gathered: Gathered) -> None:
        """All records of a case."""
        self.rejections += gathered.rejections
        if gathered.material is None:
            return
        if self._seen and gathered.fingerprint is not None:
            if cause := self._seen.check_image(gathered.material.image.sha256, gathered.fingerprint):
                # What was said of its other side goes with it: a case is counted once.
                self.rejections[len(self.rejections) - len(gathered.rejections):] = [
                    Rejection(gathered.case.id, CASE, cause)]
                return
            self._seen.take_image(gathered.material.image.sha256, gathered.fingerprint)
        self.told["partly" if gathered.rejections else "whole"] += 1
        for mode in gathered.modes:
            self.add_row(mode, tell(gathered, mode))

    def add_row(self, mode: str, row: Row) -> None:
        """One record."""
        self._writers[mode].add(row)

    def write_rejections(self, folder: pathlib.Path) -> None:
        """A line for each in FOLDER/rejected.jsonl; no file if there is none."""
        if self.rejections:
            write_text(folder / REJECTED, "".join(json.dumps(one._asdict()) + "\n" for one in self.rejections))

    def describe(self) -> dict[str, Any]:
        """For the manifest: records of each mode, and the causes with the cases that they hit."""
        causes = collections.defaultdict(list)
        for one in self.rejections:
            causes[one.cause].append(one.id)
        return {"counts": self.counts,
                "rejections": {cause: {"count": len(ids), "ids": ids} for cause, ids in sorted(causes.items())}}
