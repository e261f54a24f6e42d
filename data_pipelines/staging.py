"""Brings a data set to local disk before the start: from `gs://`, a mounted bucket or any folder.

    python -m data_pipelines.staging --source gs://bucket/irgl --out /mnt/disk/irgl

or `data.stage_dir` in a training config, with which every host at its start copies the groups of its
mixture. With `data.stage_steps` too, a host plans that many steps and copies of a built data set only the
shards that hold records of its own packs. Records are shuffled, so a shard of many records is soon wanted
by every host: build small ones (`--shard_mib`) to have a share worth the name. A shard that is wanted
after all (later steps, a record in a broken one's place) is copied when it is first read. Where a disk is
too small for that, leave `stage_dir` empty and read the mounted bucket in place.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow
from absl import flags
from pyarrow import fs
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import DataConfig
from data_pipelines.digests import MANIFEST, write_json
from data_pipelines.jobs import show_progress
from data_pipelines.layout import INFO

_PIECE = 4 * 2**20   # bytes read at a time
_RETRY_SECONDS = 60  # of one request to a bucket
_LEVELS = 2          # a group's folder lies at most so far below its data set's
_LOCK, PARTIAL = ".staging.lock", ".staging.partial"
_ORIGIN = ".staging.json"  # where a folder was staged from, for what is still missing
_SHARD = ".array_record-"  # in the name of each shard of a built data set


def stage_mixture(config: DataConfig) -> pathlib.Path:
    """Copies the groups of a mixture to `stage_dir`; with `stage_steps`, built ones without their shards."""
    groups = [pathlib.PurePosixPath(config.split, group.folder or group.name) for group in config.groups]

    def is_wanted(name: str, files: Collection[str]) -> bool:
        path = pathlib.PurePosixPath(name)
        # Without a manifest, only the shards themselves would tell which data set this is.
        is_built = MANIFEST in files and f"{path.parent}/{INFO}" in files
        if config.stage_steps and is_built and _SHARD in path.name:
            return False
        # Of a group, or beside the folders that lead to it: manifests.
        return any(path.is_relative_to(group) or group.is_relative_to(path.parent) for group in groups)
    return stage(config.source, config.stage_dir, is_wanted=is_wanted)


def stage(source: str, folder: str | pathlib.Path, *, threads: int = 8,
          is_wanted: Callable[[str, Collection[str]], bool] = lambda name, files: True) -> pathlib.Path:
    """Copies files of `source` below `folder` and returns that.

    Files that are there with the source's size and time are kept; times are copied, so that a staged
    data set is the same one on every host.

    Args:
        source: a folder, or a URI that pyarrow reads, such as gs://bucket/folder.
        threads: files copied at once.
        is_wanted: whether a file, by its name below `source`, of all its files, is copied now.
    Raises: ValueError if the source is absent or empty, a file fails its size or digest, the disk is
        too small, or `folder` holds files that the source does not have.
    """
    folder = pathlib.Path(folder).absolute()
    files, base, system = _list_files(source)
    digests = _read_manifest(source, files, base, system)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _check_strangers(folder, files, source)
        write_json(folder / _ORIGIN, {"source": source if "://" in source else base})
        # What is not wanted but there already may be wanted later, so it is kept as the source has it.
        missing = {name: info for name, info in files.items() if not _is_same(folder / name, info)
                   and (is_wanted(name, files.keys()) or (folder / name).exists())}
        _copy_all(system, missing, folder, digests, source, threads)
    return folder


def find_origin(folder: pathlib.Path) -> pathlib.Path | None:
    """The staged data set that a group's `folder` is of, if files may come later; else None."""
    homes = (folder, *folder.parents)[:1 + _LEVELS]
    return next((home for home in homes if (home / _ORIGIN).is_file() and (home / MANIFEST).is_file()), None)


def fetch(root: pathlib.Path, paths: Iterable[pathlib.Path], *, threads: int = 8) -> None:
    """Copies those shards below a staged folder that are missing, from where the rest came.

    Raises: ValueError as `stage` does.
    """
    missing = sorted({path for path in paths if not path.exists()})
    if not missing:
        return
    source = json.loads((root / _ORIGIN).read_text(encoding="utf-8"))["source"]
    system, base = _open(source)
    digests = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
    with _alone(root):
        names = [path.relative_to(root).as_posix() for path in missing if not path.exists()]
        try:
            infos = system.get_file_info([f"{base}/{name}" for name in names])
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"cannot read {source} ({error}); mount it, or correct its credentials") from error
        _copy_all(system, dict(zip(names, infos)), root, digests, source, threads)


def _copy_all(system: fs.FileSystem, files: Mapping[str, fs.FileInfo], folder: pathlib.Path,
              digests: Mapping[str, str], source: str, threads: int) -> None:
    total, free = sum(info.size or 0 for info in files.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(f"staging {source} takes {total / 2**30:.1f} GiB, but {folder} has "
                         f"{free / 2**30:.1f} GiB left; use a larger disk, or read the mounted bucket "
                         "without stage_dir")
    with (show_progress(total=total, desc=f"staging {source}", unit="B", unit_scale=True) as bar,
          ThreadPoolExecutor(threads) as pool):
        copies = [pool.submit(_copy, system, info, folder / name, digests.get(name), bar)
                  for name, info in files.items()]
        try:
            for copy in copies:
                copy.result()
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def _open(source: str) -> tuple[fs.FileSystem, str]:
    """Raises: ValueError if pyarrow knows no such source."""
    uri = source
    if source.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in source:
        # Without credentials or a network, Google's library would keep trying for a quarter of an hour.
        uri += f"{'&' if '?' in source else '?'}retry_limit_seconds={_RETRY_SECONDS}"
    try:
        system, base = (fs.FileSystem.from_uri(uri) if "://" in source else
                        (fs.LocalFileSystem(), os.path.abspath(source)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot open {source} ({error}); correct the source, or its credentials") from error
    return system, base.rstrip("/")


def _list_files(source: str) -> tuple[dict[str, fs.FileInfo], str, fs.FileSystem]:
    """The files by their name below `source`, and where that is."""
    system, base = _open(source)
    try:
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot list {source} ({error}); correct the source, or its credentials") from error
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
        for partial in folder.rglob(f"*{PARTIAL}"):
            partial.unlink()
        yield


def _check_strangers(folder: pathlib.Path, files: Mapping[str, fs.FileInfo], source: str) -> None:
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    strangers = sorted(here - files.keys() - {_LOCK, _ORIGIN})
    if strangers:
        raise ValueError(f"{folder} holds {strangers[0]!r}, which {source} does not; stage into a folder of "
                         "its own")


def _is_same(path: pathlib.Path, info: fs.FileInfo) -> bool:
    return path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns)


def _copy(system: fs.FileSystem, info: fs.FileInfo, path: pathlib.Path, digest: str | None, bar: tqdm) -> None:
    """One file, whole or not at all. Raises: ValueError naming it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, found = path.with_name(path.name + PARTIAL), hashlib.sha256()
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
