"""From a folder in the released layout to a TFDS data set, in parallel, and again after kill -9.

The rows of a group are cut into shards at row groups, in order, so the result depends neither on the
number of processes nor on where an earlier run ended. A shard takes its name when it is whole, and then
what it holds is noted beside it; a later run reads it once, compares its digest, and keeps it. Nothing
appears in DIR before everything is written and every record was found to be good.
"""

import io
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from data_pipelines import tfds_builder
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.digests import MANIFEST, file_sha256, read_recorded, write_bytes, write_json
from data_pipelines.inspection import (
    group_of,
    list_roles,
    measure_record,
    open_tokenizer,
    read_conversation,
)
from data_pipelines.jobs import default_workers, run_jobs, show_progress
from data_pipelines.layout import Group, find_groups
from data_pipelines.manifests import alone, is_built, list_files, partial_folder, publish
from data_pipelines.samples import Cost
from data_pipelines.sources import COLUMNS, RowGroup, list_row_groups, read_row, read_row_group
from data_pipelines.stored_costs import ITEM, describe_costs, save_costs

_PLAN = "plan.json"
_COLUMNS = COLUMNS["conversation"]


class Shard(NamedTuple):
    """A file to be written."""

    path: pathlib.Path
    notes: pathlib.Path           # what it holds, when it is done; its costs are beside it
    mode: str
    rows: tuple[RowGroup, ...]
    config: DataConfig
    group: GroupConfig
    tokenizer: str                # file
    decode: bool


class Written(NamedTuple):
    """A finished shard."""

    records: int
    num_bytes: int            # of its records
    sha256: str               # of the file
    faults: tuple[str, ...]   # a sentence for each that was found; their records are not in it


def convert(source: str | pathlib.Path, *, out: str | pathlib.Path, config: DataConfig, tokenizer: str,
            overwrite: bool = False, drop_bad: bool = False, decode: bool = True, workers: int = 0,
            shard_mib: int = 256) -> bool:
    """Writes all modes of `source` as TFDS data sets `out`/[<split>/]<mode>.

    Args:
        config: its transforms, limits and groups' transforms decide the costs, and what is bad.
        tokenizer: file of the tokenizer that counts the texts' tokens.
        drop_bad: leaves bad records out and names them in the manifest.
        decode: decodes every image once, to be sure of it.
        workers: processes; 0: one for each core.
        shard_mib: unpacked parquet of a shard, about.
    Returns: False if `out` already holds exactly this data set, True if it was written.
    Raises: ValueError that lists every bad record and every file that cannot be read, unless `drop_bad`;
        or if `out` holds anything else.
    """
    out = pathlib.Path(out).resolve()    # a link stays, and leads to the data set
    groups = find_groups(source)
    rows = _list_rows(groups)
    wanted = _describe(groups, rows, config, tokenizer, shard_mib=shard_mib, decode=decode)
    partial, progress = partial_folder(out), _progress_folder(out)
    if is_built(out, wanted, overwrite=overwrite):
        shutil.rmtree(progress, ignore_errors=True)
        return False
    with alone(progress, out):
        if not _is_begun(progress, wanted):
            _clear(partial)
            _clear(progress)
            write_json(progress / _PLAN, wanted)
        shards = {group.path: _plan_shards(group, rows[group.path], out, config, tokenizer, decode, shard_mib)
                  for group in groups}
        written = _write_all(shards, workers or default_workers())
        faults = [fault for group in written.values() for shard in group for fault in shard.faults]
        if faults and not drop_bad:
            raise ValueError("\n".join([f"{len(faults)} faults in {str(source)!r}; repair the data, or pass "
                                        "--drop_bad to leave these records out:", *faults]))
        modes = {group.path: _finish(group, partial / group.path, shards[group.path], written[group.path],
                                     wanted["costs"][group.path]) for group in groups}
        digests = {shard.path.relative_to(partial).as_posix(): done.sha256
                   for path in shards for shard, done in zip(shards[path], written[path], strict=True)}
        _write_manifest(partial, wanted | {"modes": modes, "left_out": faults}, digests)
        publish(out)
        shutil.rmtree(progress)
    return True


def write_shard(shard: Shard) -> Written:
    """Writes a shard and notes what it holds, or returns the notes of one that is whole already.

    Raises: ValueError if the disk does not take it.
    """
    try:
        return _read_notes(shard) or _write_shard(shard)
    except (OSError, RuntimeError) as error:  # Riegeli raises the latter, in several lines
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{shard.path} cannot be written ({reason}); make room, and the same command goes on "
                         "where this one ended") from error


def _write_shard(shard: Shard) -> Written:
    serialize, tokenizer = tfds_builder.make_serializer(), open_tokenizer(shard.tokenizer)
    temporary = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.tmp")
    faults: list[str] = []
    items, num_bytes = [], 0
    writer = array_record_module.ArrayRecordWriter(str(temporary), tfds_builder.WRITER_OPTIONS)
    for record, roles in _read_records(shard, faults):
        costs, wrong = measure_record(record, shard.config, tokenizer, group=shard.group)
        faults += wrong
        if costs is not None:
            data = serialize(tfds_builder.make_example(record, roles, costs))
            writer.write(data)
            items.append(costs)
            num_bytes += len(data)
    writer.close()
    _sync(temporary)
    done = Written(len(items), num_bytes, file_sha256(temporary), tuple(faults))
    os.replace(temporary, shard.path)
    costs = io.BytesIO()
    np.savez(costs, lengths=np.array([len(item) for item in items], np.int64),
             items=np.concatenate(items or [np.zeros((0, ITEM), np.int32)]))
    write_bytes(shard.notes.with_suffix(".npz"), costs.getvalue())    # on disk before its notes
    write_json(shard.notes, done._asdict())
    return done


def _read_records(shard: Shard, faults: list[str]) -> Iterator[tuple[Any, list[str]]]:
    """Good records and their roles; what is wrong with the others goes to `faults`."""
    for group in shard.rows:
        try:
            table = read_row_group(group, _COLUMNS)
        except ValueError as error:
            faults.append(str(error))
            continue
        for offset in range(group.num_rows):
            try:
                row = read_row(table, group, offset)
            except ValueError as error:
                faults.append(str(error))
                continue
            record, wrong = read_conversation(row.text, mode=shard.mode, place=row.place, config=shard.config,
                                              decode=shard.decode)
            faults += wrong
            if record is not None:
                yield record, list_roles(row.text)


def _read_notes(shard: Shard) -> Written | None:
    """What a shard holds if it is whole; None if it must be written."""
    try:
        notes = json.loads(shard.notes.read_text(encoding="utf-8"))
        done = Written(**(notes | {"faults": tuple(notes["faults"])}))
        items, lengths = _load_items(shard)
        is_whole = len(lengths) == done.records and lengths.sum() == len(items)
        return done if is_whole and file_sha256(shard.path) == done.sha256 else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _load_items(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    with np.load(shard.notes.with_suffix(".npz"), allow_pickle=False) as file:
        return file["items"], file["lengths"]


def _sync(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _list_rows(groups: Sequence[Group]) -> dict[str, list[RowGroup]]:
    """The row groups of every group. Raises: ValueError with every file that cannot be opened."""
    rows: dict[str, list[RowGroup]] = {}
    faults = []
    for group in groups:
        if not group.files:
            raise ValueError(f"{group.folder} holds no parquet files; it is built already")
        if group.files[0].suffix != ".parquet":
            raise ValueError(f"{group.folder} holds JSONL; only conversations are built, training reads the "
                             "other kinds as they are")
        recorded = read_recorded(group.folder, group.files).files
        rows[group.path] = []
        for file in group.files:
            name = file.relative_to(group.folder).as_posix()
            try:
                rows[group.path] += list_row_groups(file, _COLUMNS, recorded.get(name))
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise ValueError("\n".join([f"{len(faults)} files cannot be read:", *faults]))
    return rows


def _describe(groups: Sequence[Group], rows: Mapping[str, Sequence[RowGroup]], config: DataConfig,
              tokenizer: str, *, shard_mib: int, decode: bool) -> dict[str, Any]:
    """What the data set is."""
    digests = {group.path: read_recorded(group.folder, group.files).content for group in groups}
    opened = open_tokenizer(tokenizer)
    costs = {group.path: describe_costs(config, group_of(config, group.mode), opened) for group in groups}
    shards = {path: len(_cut(rows[path], shard_mib)) for path in rows}
    return {"format": tfds_builder.FORMAT, "source": digests, "costs": costs, "shards": shards,
            "unknown_role": config.unknown_role, "decoded": decode}


def _progress_folder(out: pathlib.Path) -> pathlib.Path:
    """What finished shards hold, and the plan they belong to; removed when the data set has its name."""
    return out.with_name(f".{out.name}.progress")


def _clear(folder: pathlib.Path) -> None:
    """Removes all that a folder holds, and not the folder, which may be locked."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_begun(progress: pathlib.Path, wanted: Mapping[str, Any]) -> bool:
    try:
        return json.loads((progress / _PLAN).read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        return False


def _cut(rows: Sequence[RowGroup], shard_mib: int) -> list[list[RowGroup]]:
    """Row groups in order, in pieces of at least `shard_mib`."""
    pieces: list[list[RowGroup]] = [[]]
    for group in rows:
        if pieces[-1] and sum(row.num_bytes for row in pieces[-1]) >= shard_mib * 2**20:
            pieces.append([])
        pieces[-1].append(group)
    return pieces


def _plan_shards(group: Group, rows: Sequence[RowGroup], out: pathlib.Path, config: DataConfig, tokenizer: str,
                 decode: bool, shard_mib: int) -> list[Shard]:
    folder, notes = partial_folder(out) / group.path, _progress_folder(out) / group.path
    folder.mkdir(parents=True, exist_ok=True)
    notes.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # of a run that was killed
        if path.suffix == ".tmp":
            path.unlink()
    pieces = _cut(rows, shard_mib)
    return [Shard(folder / tfds_builder.shard_name(i, len(pieces)), notes / f"{i:05d}.json", group.mode,
                  tuple(piece), config, group_of(config, group.mode), tokenizer, decode)
            for i, piece in enumerate(pieces)]


def _write_all(shards: Mapping[str, Sequence[Shard]], workers: int) -> dict[str, list[Written]]:
    """Writes every shard, in any order. Returns: what they hold, in order."""
    places = [(path, i) for path in shards for i in range(len(shards[path]))]
    jobs = [shards[path][i] for path, i in places]
    done: dict[tuple[str, int], Written] = {}
    total = sum(row.num_rows for job in jobs for row in job.rows)
    with show_progress(total=total, desc="build", unit="record") as progress:
        for index, result in run_jobs(write_shard, jobs, workers=workers):
            done[places[index]] = result
            progress.update(sum(row.num_rows for row in jobs[index].rows))
    return {path: [done[path, i] for i in range(len(shards[path]))] for path in shards}


def _finish(group: Group, folder: pathlib.Path, shards: Sequence[Shard], written: Sequence[Written],
            key: Mapping[str, Any]) -> dict[str, int]:
    """Writes what makes finished shards a data set. Returns: what it holds, for the manifest."""
    loaded = [_load_items(shard) for shard in shards]
    items = np.concatenate([items for items, _ in loaded])
    offsets = np.cumsum(np.concatenate([[0], *(lengths for _, lengths in loaded)]), dtype=np.int64)
    save_costs(folder, items, offsets, key)
    num_bytes = sum(shard.num_bytes for shard in written)
    tfds_builder.write_info(folder, mode=group.mode, lengths=[shard.records for shard in written],
                            num_bytes=num_bytes)
    totals = dict(zip(Cost._fields, items[:, 1:].sum(axis=0, dtype=np.int64).tolist()))
    return {"records": len(offsets) - 1, "bytes": num_bytes, **totals}


def _write_manifest(partial: pathlib.Path, values: dict[str, Any], known: Mapping[str, str]) -> None:
    """Args: known has the digests of files that need not be read again."""
    files = list_files(partial)
    values["versions"] = {name: version(name) for name in ("array_record", "tensorflow-datasets", "numpy")}
    values["files"] = {name: known.get(name) or file_sha256(path) for name, path in files.items()}
    values["sizes"] = {name: path.stat().st_size for name, path in files.items()}
    write_json(partial / MANIFEST, values)
