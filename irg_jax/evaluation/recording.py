"""Writes the folder of an evaluation, so that it can be interrupted anywhere.

    progress.json   written first: what is evaluated, and the time spent on it so far
    images/*.png    written before the line that names them
    results.jsonl   one line a (prompt, system), appended as they come
    manifest.json   written once all lines are there; `results.py` reads nothing without it
"""

import json
import os
import pathlib
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

PROGRESS, RESULTS, MANIFEST, IMAGES = "progress.json", "results.jsonl", "manifest.json", "images"


class Recorder:
    """An evaluation under way in a folder; `done` holds (id, system) of what is there already."""

    def __init__(self, folder: str | pathlib.Path, identity: Mapping[str, Any]):
        """Args: identity is JSON, whatever makes two evaluations comparable line by line.

        Raises: ValueError if the folder holds another evaluation, or something else.
        """
        self.folder, self._start = pathlib.Path(folder), time.monotonic()
        self._state = {"identity": dict(identity), "checkpoints": {}, "seconds": 0.0,
                       "peak_rss_gib": 0.0}
        if (self.folder / PROGRESS).exists():
            self._state |= _read(self.folder / PROGRESS)
            self._compare(self._state["identity"], identity)
        elif self.folder.exists() and any(path.name != _partial(PROGRESS) for path in self.folder.iterdir()):
            raise ValueError(f"{str(folder)!r} holds something else than an evaluation (it has no "
                             f"{PROGRESS}); choose another --out")
        self.done = set(self._recover())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()   # before anything else is there: it tells an evaluation from something else
        (self.folder / IMAGES).mkdir(exist_ok=True)
        self.is_complete = (self.folder / MANIFEST).exists()

    def identify(self, name: str, checkpoint: Mapping[str, str]) -> None:
        """Notes which weights are evaluated, before a line of theirs. Raises ValueError if they were others."""
        known = self._state["checkpoints"].setdefault(name, dict(checkpoint))
        self._compare({name: known["sha256"]}, {name: checkpoint["sha256"]})
        self.save()

    def add(self, image: np.ndarray, make_record: Callable[[str], dict[str, Any]], *, id: str,
            system: str) -> None:
        """Saves an image uint8 [H, W, 3], then the line `make_record(path of the image)`."""
        file = f"{IMAGES}/{id}_{system}.png"
        Image.fromarray(image).save(self.folder / file)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(make_record(file)) + "\n")
        self.done.add((id, system))

    def save(self) -> None:
        """Notes time and memory; to be called now and then."""
        now = time.monotonic()
        self._state["seconds"] += now - self._start
        self._start = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        self._state["peak_rss_gib"] = max(self._state["peak_rss_gib"], peak)
        _write(self.folder / PROGRESS, self._state)

    def finish(self, *, prompts: int, **fields: Any) -> None:
        """Writes the manifest of `prompts` prompts; `fields` as `results.Manifest` names them."""
        self.save()
        _write(self.folder / MANIFEST, {
            "prompts": prompts, "checkpoints": self._state["checkpoints"],
            "seconds": self._state["seconds"], "peak_rss_gib": self._state["peak_rss_gib"],
            **fields})
        self.is_complete = True

    def _recover(self) -> list[tuple[str, str]]:
        """(id, system) of the lines that are whole; a last one that was cut off is removed from the file."""
        path = self.folder / RESULTS
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[:raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            return [(line["id"], line["system"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the lines of an evaluation ({error!r}); remove the folder and "
                             "evaluate again") from error

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise ValueError(f"{str(self.folder)!r} holds another evaluation (its "
                             f"{', '.join(differing)} differ); choose another --out, or remove it")


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(values[name], dict) for name in ("identity", "checkpoints")):
            raise ValueError("its fields are not those of an evaluation")
        return values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error!r}); remove the folder and evaluate again"
                         ) from error


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    """A reader sees the old file or the new one, never half of it."""
    partial = path.with_name(_partial(path.name))
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _partial(name: str) -> str:
    return f".{name}.partial"
