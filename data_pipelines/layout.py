"""Which groups a folder holds: `<mode>/*.parquet`, `<split>/<mode>/*.parquet`, JSONL, or built data sets."""

import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

INFO = "dataset_info.json"  # marks the folder of a TFDS data set
IMAGES = "images"           # folder of the images that JSONL files beside it name
SPLIT = "train"             # its one split: all of a group; our own splits are folders
ROLES = ("user", "assistant")
TYPES = ("text", "image")   # of the parts of a record
_DEPTH = 2                  # a group's folder lies at most so far below the data set's


class Group(NamedTuple):
    """A folder of records of one mode, below the data set's."""

    path: str                         # from the data set's folder: `<mode>` or `<split>/<mode>`
    folder: pathlib.Path
    files: tuple[pathlib.Path, ...]   # parquet or JSONL; none for a TFDS data set

    @property
    def mode(self) -> str:
        """The name of the mode."""
        return self.folder.name


def find_groups(root: str | pathlib.Path) -> list[Group]:
    """All groups below a folder, in the order of their paths. Hidden folders are not searched.

    Raises: ValueError if there is none.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder")
    found = [path for path in _search(root) if path.parent != root]
    parquet = [path for path in found if path.suffix == ".parquet"]
    # A mode may keep its files in folders of its own; the shallowest file tells whether there are splits.
    depth = min((len(path.relative_to(root).parts) - 1 for path in parquet), default=1)
    folders: dict[pathlib.Path, list[pathlib.Path]] = {path.parent: [] for path in found if path.name == INFO}
    for path in parquet:
        folder = root.joinpath(*path.relative_to(root).parts[:min(depth, _DEPTH)])
        folders.setdefault(folder, []).append(path)
    rows = {*folders}
    for path in found:
        if path.suffix == ".jsonl" and rows.isdisjoint([path.parent, *path.parents]):
            folders.setdefault(path.parent, []).append(path)
    if not folders:
        raise ValueError(f"{str(root)!r} holds neither <mode>/*.parquet nor <split>/<mode>/*.parquet nor JSONL "
                         "there nor a data set of data_pipelines.build; name the folder above the modes")
    return [Group(folder.relative_to(root).as_posix(), folder, tuple(sorted(files)))
            for folder, files in sorted(folders.items())]


def _search(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Parquet and JSONL files, and what marks data sets."""
    for place, folders, names in os.walk(root, followlinks=True):
        folder = pathlib.Path(place)
        depth = len(folder.relative_to(root).parts)
        # A mode's or a split's folder may be a link; readers follow none that lie deeper.
        folders[:] = [name for name in folders
                      if not name.startswith(".") and (depth < _DEPTH or not (folder / name).is_symlink())]
        if any(name.endswith(".jsonl") for name in names) and depth:
            folders[:] = [name for name in folders if name != IMAGES]  # millions of files, perhaps
        for name in names:
            if name == INFO or name.endswith(".parquet") or (name.endswith(".jsonl") and depth <= _DEPTH):
                yield folder / name
