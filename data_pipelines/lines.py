"""Random access to the lines of JSONL files, and the images that lie beside them.

    <source>/<split>/<group>/*.jsonl
    <source>/<split>/<group>/images/...   what the lines name, by paths inside this folder

A line is found by its offset, so a file is read once, for its line breaks, and then line by line.
That once, it is also compared with the digest that is recorded of it, see `digests`.
"""

import bisect
import hashlib
import itertools
import os
import pathlib
import re
import stat
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.digests import read_recorded

MAX_LINE_BYTES = 16 * 2**20    # of one line; images are files of their own
_CHUNK = 2**24                 # bytes of a file searched for line breaks at a time
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Line(NamedTuple):
    """The bytes of one line, and the file and line (from 1, as editors count) it stands in."""

    data: bytes
    place: str


class JsonLines:
    """All lines of one group: `lines[i]` is a `Line`; empty ones are no lines. Safe for many threads."""

    def __init__(self, folder: str | pathlib.Path, *, digests: str | pathlib.Path = ""):
        """Args: folder with JSONL files; digests as of `read_recorded`.

        Raises: ValueError naming what is missing, empty, not readable or not as recorded.
        """
        self.folder = pathlib.Path(folder)
        self.files = sorted(self.folder.glob("*.jsonl"))
        if not self.files:
            raise ValueError(f"no JSONL file in {str(self.folder)!r}; correct source, split, groups and kind")
        recorded = read_recorded(self.folder, self.files, suffix=".jsonl", digests=digests)
        self.digest = recorded.content
        bar = tqdm(self.files, f"lines of {self.folder.name}", disable=None, leave=False)
        self._spans = [find_lines(file, recorded.whole(file.name)) for file in bar]
        self._ends = list(itertools.accumulate(map(len, self._spans)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Line:
        """Raises: ValueError naming file and line if it is too long or cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        spans = self._spans[number]
        return read_line(self.files[number], spans[index - (self._ends[number] - len(spans))])


def read_line(path: pathlib.Path, span: np.ndarray) -> Line:
    """Args: span, a row of `find_lines`. Raises: ValueError if it is too long or cannot be read."""
    line, start, end = span.tolist()
    place = f"{path} line {line}"
    if end - start > MAX_LINE_BYTES:
        raise ValueError(f"{place}: line of {end - start} bytes is over the limit of {MAX_LINE_BYTES}")
    try:
        with open(path, "rb") as file:  # anew each time: a file's position belongs to one thread
            file.seek(start)
            return Line(file.read(end - start), place)
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror})") from error


def find_lines(path: pathlib.Path, sha256: str = "") -> np.ndarray:
    """int64 [lines, 3]: number from 1, first byte, and the byte after the last; without empty lines.

    Args: sha256 of the file as recorded; empty: nothing is.
    Raises: ValueError if it cannot be read, has no lines, or is another file.
    """
    breaks, returns, size, found = [], [], 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                for places, byte in ((breaks, "\n"), (returns, "\r")):
                    places.append(size + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord(byte)))
                size += len(chunk)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if sha256 not in ("", found.hexdigest()):
        raise ValueError(f"{path} is damaged (not what was recorded); restore the file; if it was changed on "
                         "purpose, run python -m data_pipelines.check --write")
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    is_empty = (ends == starts) | (ends == starts + 1) & np.isin(starts, np.concatenate(returns))
    spans = np.stack([np.arange(1, len(ends) + 1), starts, ends], axis=1)[~is_empty]
    if not len(spans):
        raise ValueError(f"{path}: the JSONL file has no lines")
    return spans


class Folder:
    """Files by the paths that records name; no path leads out, whatever a record says."""

    def __init__(self, root: str | pathlib.Path):
        self._root = pathlib.Path(root)
        self._real_root = pathlib.Path(os.path.realpath(root))

    def read(self, path: Any, *, where: str, limit: int) -> bytes:
        """The bytes of an image. Raises: ValueError naming `where` if it is no file inside, or over `limit`."""
        found, status = self._find(path, where)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: not a readable image but a folder or device")
        if status.st_size > limit:
            raise ValueError(f"{where}: encoded image of {status.st_size} bytes is over max_image_bytes "
                             f"{limit}")
        try:
            return found.read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: not a readable file ({error.strerror})") from error

    def path(self, path: str) -> pathlib.Path:
        """Where a file lies that was read."""
        return self._root / path

    def frames(self, path: str, *, where: str) -> list[str]:
        """Paths of the images in a folder of frames, frame 10 after frame 9.

        Raises: ValueError naming `where` if it is no folder inside, or holds no image.
        """
        found, status = self._find(path, where)
        if not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{where}: videos are not decoded here; extract the frames to a folder "
                             "(ffmpeg -i VIDEO FOLDER/%05d.jpg) and name that folder")
        try:
            names = [name for name in os.listdir(found) if name.lower().endswith(_SUFFIXES)]
        except OSError as error:
            raise ValueError(f"{where}: not a readable folder ({error.strerror})") from error
        if not names:
            raise ValueError(f"{where}: the folder holds no frame ({', '.join(_SUFFIXES)})")
        return [f"{path.rstrip('/')}/{name}" for name in sorted(names, key=_natural)]

    def _find(self, path: Any, where: str) -> tuple[pathlib.Path, os.stat_result]:
        """The file with all links followed, and its status."""
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: a path must be a string that is not empty")
        parts = pathlib.PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"{where}: the path must lie inside {self._root}, neither absolute nor with '..'")
        try:
            found = pathlib.Path(os.path.realpath(self._root / path))
            status = found.stat()
        except (OSError, ValueError) as error:  # ValueError: what no file system takes as a name
            raise ValueError(f"{where}: not a readable file in {self._root} ({error})") from error
        if not found.is_relative_to(self._real_root):
            raise ValueError(f"{where}: the path is a link that leads out of {self._root}")
        return found, status


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by value; each piece is compared as (value, text)."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
