"""What files held when they were built or checked, so that a changed byte is found when it is read.

A `manifest.json` (of `build`) or a `digests.json` (of `check --write`) lies in the folder of the
data set and names the files below it:

    manifest.json   {"files": {path: sha256}, "sizes": {path: bytes}}
    digests.json    {"files": {path: {"size": bytes, "footer": sha256, "groups": [sha256, ...]}}}

Parquet as most tools write it has no checksums, and nearly every flipped byte is silently wrong
text. The digests of its footer and of each row group are compared whenever they are read, so a
start-up reads footers and no data, and a copied folder is still the same data set. A JSONL file has
no footer: there the digest is of the whole file, which is read at the start for its line breaks anyway.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet

MANIFEST = "manifest.json"
DIGESTS = "digests.json"
_LEVELS = 3  # a group's folder, its split's and its data set's may hold the digests
_TAIL = 8    # bytes after a parquet footer: its length and the magic number


class FileDigest(NamedTuple):
    """Of one parquet file: sha256 of its footer and of the bytes of each row group; or of a JSONL file."""

    size: int
    footer: str               # of JSONL: of all of it
    groups: tuple[str, ...]


class Recorded(NamedTuple):
    """What is recorded of the files of one group."""

    content: str                     # sha256 over names and digests; without, names, sizes and times
    files: Mapping[str, FileDigest]  # by name below the group's folder; empty without digests.json
    sha256: Mapping[str, str]        # of whole files; empty without a manifest
    faults: tuple[str, ...] = ()     # files that are absent, not listed, or of another size

    def whole(self, name: str) -> str:
        """sha256 of a JSONL file; empty if nothing is recorded."""
        return self.files[name].footer if name in self.files else self.sha256.get(name, "")


def read_recorded(folder: str | pathlib.Path, files: Sequence[pathlib.Path], *, suffix: str = ".parquet",
                  digests: str | pathlib.Path = "", may_lack: bool = False) -> Recorded:
    """Looks the files of a group up in the manifest and the digests of its data set.

    Args:
        folder: holds the files, at any depth.
        suffix: ends the names of all such files, also of those that should be there.
        digests: a file in the form of digests.json that lies elsewhere.
        may_lack: files may be listed but absent; they come when they are needed.
    Raises: ValueError if a file is not listed, is listed but absent, or has another size.
    """
    recorded = compare_recorded(folder, files, suffix=suffix, digests=digests, may_lack=may_lack)
    if recorded.faults:
        raise ValueError(recorded.faults[0])
    return recorded


def compare_recorded(folder: str | pathlib.Path, files: Sequence[pathlib.Path], *, suffix: str = ".parquet",
                     digests: str | pathlib.Path | None = "", may_lack: bool = False) -> Recorded:
    """As `read_recorded`, but every file that is not as recorded is in `faults`.

    Args: digests may be None: the manifest alone is looked at.
    """
    folder = pathlib.Path(folder).absolute()
    names = {file.absolute().relative_to(folder).as_posix(): file for file in files}
    below = [(home, depth) for depth, home in enumerate((folder, *folder.parents)[:_LEVELS])]
    manifest, place = _entries([(home / MANIFEST, depth) for home, depth in below], folder, suffix)
    sizes, _ = _entries([place], folder, suffix, field="sizes")
    faults = _compare_sizes(
        place[0], {name: sizes.get(name) for name in manifest if not may_lack or name in names}, names)
    places = [(pathlib.Path(digests), depth) for _, depth in reversed(below)] if digests else [
        (home / DIGESTS, depth) for home, depth in below]
    listed, (path, _) = _entries([] if digests is None else places, folder, suffix)
    parquet = {name: _as_digest(entry, path) for name, entry in listed.items()}
    faults += _compare_sizes(path, {name: digest.size for name, digest in parquet.items()}, names)
    entries = manifest or parquet  # the manifest first: recording digests later changes nothing
    content = _sha256(sorted(map(list, entries.items()))) if entries else _stat_digest(files)
    return Recorded(content, parquet, manifest, tuple(faults))


def file_sha256(path: str | pathlib.Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: pathlib.Path) -> FileDigest:
    """Reads a parquet or JSONL file once. Raises: ValueError if a parquet footer is broken."""
    if path.suffix != ".parquet":
        return FileDigest(path.stat().st_size, file_sha256(path), ())
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    groups = tuple(group_sha256(path, metadata, i) for i in range(metadata.num_row_groups))
    return FileDigest(path.stat().st_size, footer_sha256(path), groups)


def footer_sha256(path: pathlib.Path) -> str:
    """sha256 of a parquet file's footer: the schema, and where everything lies."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _TAIL))
        length = int.from_bytes(file.read(4), "little") + _TAIL
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read()).hexdigest()


def group_sha256(path: pathlib.Path, metadata: pyarrow.parquet.FileMetaData, group: int) -> str:
    """sha256 of the bytes of one row group, all columns and page headers."""
    row_group, ranges = metadata.row_group(group), []
    for i in range(row_group.num_columns):
        column = row_group.column(i)
        starts = [column.data_page_offset]
        if column.has_dictionary_page and column.dictionary_page_offset:
            starts.append(column.dictionary_page_offset)
        ranges.append((min(starts), min(starts) + column.total_compressed_size))
    start, stop = min(first for first, _ in ranges), max(last for _, last in ranges)
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(stop - start)).hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """A reader of `path` sees the old text or the new one, never half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _entries(places: Sequence[tuple[pathlib.Path, int]], folder: pathlib.Path, suffix: str, *,
             field: str = "files") -> tuple[dict[str, Any], tuple[pathlib.Path, int]]:
    """The first non-empty list of files below `folder`, and the place that has it.

    Args: places are JSON files, each with how many of the last parts of `folder` its names begin with.
    """
    for path, depth in places:
        if not path.is_file():
            continue
        prefix = "".join(f"{part}/" for part in folder.parts[len(folder.parts) - depth:])
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            listed = value.get(field, {}) if isinstance(value, dict) else {}
            found = {name.removeprefix(prefix): entry for name, entry in listed.items()
                     if name.startswith(prefix) and name.endswith(suffix)}
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); restore it, or remove it and run "
                             "python -m data_pipelines.check --write") from error
        if found:
            return found, (path, depth)
    return {}, (folder / MANIFEST, 0)


def _as_digest(entry: Any, path: pathlib.Path) -> FileDigest:
    try:
        return FileDigest(int(entry["size"]), str(entry["footer"]), tuple(map(str, entry["groups"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no digests of files; remove it and run "
                         "python -m data_pipelines.check --write") from error


def _compare_sizes(path: pathlib.Path, sizes: Mapping[str, int | None],
                   names: Mapping[str, pathlib.Path]) -> list[str]:
    """A sentence for each file that `path` does not know as it is."""
    faults: list[str] = []
    fix = "restore the data set, or run python -m data_pipelines.check to see what changed"
    for name in sorted({*sizes, *names}) if sizes else ():
        size = names[name].stat().st_size if name in names else 0
        if name not in names:
            faults.append(f"{path} lists {name}, which does not exist; {fix}")
        elif name not in sizes:
            faults.append(f"{names[name]} is not listed in {path}; {fix}")
        elif sizes[name] not in (None, size):
            faults.append(f"{names[name]} has {size} bytes, {path} says {sizes[name]}; {fix}")
    return faults


def _stat_digest(files: Sequence[pathlib.Path]) -> str:
    """Tells that files were changed, without reading them."""
    return _sha256([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
