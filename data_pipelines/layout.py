"""Which groups a folder holds: `<mode>/*.parquet`, `<split>/<mode>/*.parquet`, or built data sets."""

import pathlib
from typing import NamedTuple

INFO = "dataset_info.json"  # marks the folder of a TFDS data set
SPLIT = "train"             # its one split: all of a group; our own splits are folders
ROLES = ("user", "assistant")
TYPES = ("text", "image")   # of the parts of a record


class Group(NamedTuple):
    """A folder of records of one mode, below the data set's."""

    path: str                         # from the data set's folder: `<mode>` or `<split>/<mode>`
    folder: pathlib.Path
    files: tuple[pathlib.Path, ...]   # parquet files; none for a TFDS data set

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
    built = {path.parent for path in _search(root, INFO)} - {root}
    parquet = [path for path in _search(root, "*.parquet") if path.parent != root]
    # A mode may keep its files in folders of its own; the shallowest file tells whether there are splits.
    depth = min((len(path.relative_to(root).parts) - 1 for path in parquet), default=1)
    folders: dict[pathlib.Path, list[pathlib.Path]] = {folder: [] for folder in built}
    for path in parquet:
        folder = root.joinpath(*path.relative_to(root).parts[:min(depth, 2)])
        folders.setdefault(folder, []).append(path)
    if not folders:
        raise ValueError(f"{str(root)!r} holds neither <mode>/*.parquet nor <split>/<mode>/*.parquet nor a "
                         "data set of data_pipelines.build; name the folder above the modes")
    return [Group(folder.relative_to(root).as_posix(), folder, tuple(sorted(files)))
            for folder, files in sorted(folders.items())]


def _search(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return [path for path in root.rglob(pattern)
            if not any(part.startswith(".") for part in path.relative_to(root).parts)]
