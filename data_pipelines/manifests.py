"""A data set's folder is whole or absent: built beside its place, and named at the very end."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.digests import DIGESTS, MANIFEST, file_sha256


def partial_folder(out: pathlib.Path) -> pathlib.Path:
    """Where `out` is built."""
    return out.with_name(f".{out.name}.partial")


def publish(out: pathlib.Path) -> None:
    """Gives a finished partial folder its name, in place of an older data set."""
    if out.exists():
        shutil.rmtree(out)
    partial_folder(out).rename(out)


def list_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files below a folder by their names in it, but for the manifest and digests recorded since."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name not in (MANIFEST, DIGESTS)}


def digest_files(folder: pathlib.Path) -> dict[str, str]:
    """sha256 of all files of `list_files`."""
    return {name: file_sha256(file) for name, file in list_files(folder).items()}


@contextlib.contextmanager
def alone(folder: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Holds a folder beside `out`, made if it is not there, until the context or the process ends.

    Raises: ValueError if another process is writing the same data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        yield
    except BlockingIOError as error:
        raise ValueError(f"another build is writing {str(out)!r}; wait until it has ended") from error
    finally:
        os.close(opened)


def is_built(out: pathlib.Path, wanted: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether `out` is the wanted data set; False only if nothing is there, or what may be replaced.

    A manifest that knows sizes is believed if they are right; otherwise every file is read.

    Raises: ValueError if `out` holds anything else, or can be no name of a folder that is built beside it.
    """
    if out.is_mount() or out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is {'a mount point' if out.is_dir() else 'no folder'}, and no data set "
                         "can take its place; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return False
    path = out / MANIFEST
    if not path.is_file():
        # Never removed, whatever the flags say: this is not ours.
        raise ValueError(f"{str(out)!r} exists and is no data set (it has no {MANIFEST}); choose "
                         "another --out")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON; remove {str(out)!r} and build again") from error
    differing = [key for key, value in wanted.items() if manifest.get(key) != value]
    if not differing and not _has_its_files(out, manifest):
        differing = ["files"]
    if not differing or overwrite:
        return not differing
    raise ValueError(f"{str(out)!r} holds another data set (its {', '.join(differing)} differ); "
                     "pass --overwrite to replace it, or choose another --out")


def _has_its_files(out: pathlib.Path, manifest: Mapping[str, Any]) -> bool:
    if "sizes" in manifest:
        return manifest["sizes"] == {name: file.stat().st_size for name, file in list_files(out).items()}
    return manifest.get("files") == digest_files(out)
