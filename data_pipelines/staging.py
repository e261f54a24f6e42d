"""Brings a data set to local disk before the start: from `gs://`, a mounted bucket or any folder.

    python -m data_pipelines.staging --source gs://bucket/irgl --out /mnt/disk/irgl

or `data.stage_dir` in a training config, which does the same on every host at its start. Records are
shuffled over the whole mixture and any of them may be planned for any host, so every host stages all
files: a share of the files would not hold a host's share of the packs. Where a disk is too small for
that, leave `stage_dir` empty and read the mounted bucket in place.

Every file is copied under a temporary name, compared with its size and, where the data set has a
`manifest.json`, its sha256, and then renamed. Interrupted, the same call goes on with the files that
are missing. Processes of one host wait for one another.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow
from absl import flags
from pyarrow import fs
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.digests import MANIFEST

_PIECE = 4 * 2**20  # bytes read at a time
_LOCK, _PARTIAL = ".staging.lock", ".staging.partial"


def stage(source: str, folder: str | pathlib.Path, *, threads: int = 8) -> pathlib.Path:
    """Copies all files of `source` below `folder` and returns that.

    Files that are there with the source's size and time are kept; times are copied, so that a staged
    data set is the same one on every host.

    Args:
        source: a folder, or a URI that pyarrow reads, such as gs://bucket/folder.
        threads: files copied at once.
    Raises: ValueError if the source is absent or empty, a file fails its size or digest, the disk is
        too small, or `folder` holds files that the source does not have.
    """
    folder = pathlib.Path(folder).absolute()
    files, base, system = _list_files(source)
    digests = _read_manifest(source, files, base, system)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _check_strangers(folder, files, source)
        missing = {name: info for name, info in files.items() if not _is_same(folder / name, info)}
        total = sum(info.size for info in missing.values())
        free = shutil.disk_usage(folder).free
        if total > free:
            raise ValueError(f"staging {source} takes {total / 2**30:.1f} GiB, but {folder} has "
                             f"{free / 2**30:.1f} GiB left; use a larger disk, or read the mounted bucket "
                             "without stage_dir")
        with (tqdm(total=total, desc=f"staging {source}", unit="B", unit_scale=True, disable=None) as bar,
              ThreadPoolExecutor(threads) as pool):
            copies = [pool.submit(_copy, system, info, folder / name, digests.get(name), bar)
                      for name, info in missing.items()]
            try:
                for copy in copies:
                    copy.result()
            except ValueError:
                pool.shutdown(cancel_futures=True)
                raise
    return folder


def _list_files(source: str) -> tuple[dict[str, fs.FileInfo], str, fs.FileSystem]:
    """The files by their name below `source`, and where that is."""
    try:
        if "://" in source:
            system, base = fs.FileSystem.from_uri(source)
        else:
            system, base = fs.LocalFileSystem(), os.path.abspath(source)
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot list {source} ({error}); correct the source, or its credentials") from error
    base = base.rstrip("/")
    files = {info.path[len(base) + 1:]: info for info in infos if info.type == fs.FileType.File}
    odd = [name for name in files if ".." in pathlib.PurePosixPath(name).parts]
    if odd or not files:
        raise ValueError(f"{source} holds " + (f"a file named {odd[0]!r}; rename it" if odd else "no file"))
    return files, base, system


def _read_manifest(source: str, files: Mapping[str, fs.FileInfo], base: str,
                   system: fs.FileSystem) -> dict[str, str]:
    """sha256 by name; empty without a manifest."""
    if MANIFEST not in files:
        return {}
    try:
        with system.open_input_stream(f"{base}/{MANIFEST}") as file:
            digests = dict(json.loads(file.read())["files"])
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}/{MANIFEST} cannot be read ({error!r}); restore it") from error
    absent = sorted(digests.keys() - files.keys())
    if absent:
        raise ValueError(f"{source}/{MANIFEST} lists {absent[0]!r}, which is not there; upload the data set "
                         "again")
    return digests


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """One process of this host at a time; what a killed one had begun is removed."""
    with open(folder / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however it ends
        for partial in folder.rglob(f"*{_PARTIAL}"):
            partial.unlink()
        yield


def _check_strangers(folder: pathlib.Path, files: Mapping[str, fs.FileInfo], source: str) -> None:
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    strangers = sorted(here - files.keys() - {_LOCK})
    if strangers:
        raise ValueError(f"{folder} holds {strangers[0]!r}, which {source} does not; stage into a folder of "
                         "its own")


def _is_same(path: pathlib.Path, info: fs.FileInfo) -> bool:
    return path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns)


def _copy(system: fs.FileSystem, info: fs.FileInfo, path: pathlib.Path, digest: str | None, bar: tqdm) -> None:
    """One file, whole or not at all. Raises: ValueError naming it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, found = path.with_name(path.name + _PARTIAL), hashlib.sha256()
    try:
        with system.open_input_stream(info.path) as source, open(partial, "wb") as target:
            while piece := source.read(_PIECE):
                found.update(piece)
                target.write(piece)
                bar.update(len(piece))
            target.flush()
            os.fsync(target.fileno())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{info.path} could not be copied to {path} ({error}); the same command goes on with "
                         "the files that are missing") from error
    if partial.stat().st_size != info.size or digest not in (None, found.hexdigest()):
        raise ValueError(f"{info.path} arrived with {partial.stat().st_size} bytes and sha256 "
                         f"{found.hexdigest()}; expected {info.size} bytes and {digest or 'any digest'}. "
                         "Upload the file again")
    os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
    os.replace(partial, path)


def main(values) -> None:
    print(f"staged {values.source} in {stage(values.source, values.out)}")


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "Folder or URI of the data set.")
    flags.DEFINE_string("out", None, "Local folder of the copy; nothing else may be in it.")
    flags.mark_flags_as_required(["source", "out"])
    command.run(main)
