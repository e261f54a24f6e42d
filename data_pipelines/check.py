"""Reads a whole data set and says what is wrong where; exit status 1 if anything is.

    python -m data_pipelines.check DIR [--write] [--config CONFIG] [--tokenizer TOKENIZER.json]

DIR is in the released layout (`<mode>/*.parquet`, perhaps below a folder for the split), or was written
by `build`, or holds BAGEL's own kinds, which are told by columns and JSONL, or by the configuration. Every
file is compared with what is recorded of it, every record is parsed, every image is decoded; with a
tokenizer, records that fit no pack are found too. `--write` records digests of files that are good in
DIR/digests.json (or `--digests FILE`), which training then compares as it reads.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from data_pipelines import command
from data_pipelines.array_records import list_shards, open_shard, read_record
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable, count_system_tokens, find_oversize
from data_pipelines.datasets import find_kind, make_parser
from data_pipelines.digests import (
    DIGESTS,
    FileDigest,
    compare_recorded,
    file_digest,
    file_sha256,
    write_json,
)
from data_pipelines.faults import find_cause
from data_pipelines.inspection import find_faults, group_of, limits_of, measure_record, open_tokenizer
from data_pipelines.jobs import default_workers, run_jobs, show_progress
from data_pipelines.layout import Group, find_groups
from data_pipelines.lines import Line, find_lines, read_line
from data_pipelines.records import ImagePart, Record
from data_pipelines.samples import Cost, check_opening
from data_pipelines.sources import COLUMNS, Row, list_row_groups, read_row, read_row_group


class Wish(NamedTuple):
    """How to check."""

    config: DataConfig      # limits; with a tokenizer also transforms and budgets
    tokenizer: str = ""     # file; empty: costs are not measured
    decode: bool = True     # every image; without, headers alone
    write: bool = False     # digests of parquet and JSONL files


class File(NamedTuple):
    """A file to be checked."""

    path: pathlib.Path
    folder: pathlib.Path         # of the group
    group: GroupConfig
    home: str                    # the group's path below the data set's folder
    wish: Wish
    recorded: FileDigest | None  # of parquet and JSONL
    sha256: str                  # of the whole file; empty: nobody knows
    length: int = 0              # records of an ArrayRecord file

    @property
    def name(self) -> str:
        """Below the group's folder."""
        return self.path.relative_to(self.folder).as_posix()


class Checked(NamedTuple):
    """What a file holds and what is wrong with it."""

    counts: Mapping[str, int]        # records, parts, images, bytes and, measured, the fields of Cost
    faults: tuple[str, ...]
    digest: FileDigest | None = None


def check(root: str | pathlib.Path, wish: Wish, *, digests: str | pathlib.Path = "",
          workers: int = 0) -> dict[str, Checked]:
    """Checks every group below `root`.

    Args:
        digests: file to compare with, and to write if the wish says so; DIR/digests.json by default.
        workers: processes; 0: one for each core.
    Returns: by the group's path, its counts and faults.
    Raises: ValueError if nothing is there to be checked.
    """
    root, groups = pathlib.Path(root), find_groups(root)
    target = pathlib.Path(digests or root / DIGESTS)
    faults: dict[str, list[str]] = {group.path: [] for group in groups}
    counts: dict[str, Counter[str]] = {group.path: Counter() for group in groups}
    files = [file for group in groups
             for file in _list_files(group, wish, None if wish.write else digests, faults[group.path])]
    found: dict[str, FileDigest] = {}
    size = sum(file.path.stat().st_size for file in files)
    with show_progress(total=size, desc="check", unit="B", unit_scale=True) as progress:
        for index, checked in run_jobs(check_file, files, workers=workers or default_workers()):
            file = files[index]
            faults[file.home] += checked.faults
            counts[file.home].update(checked.counts)
            if checked.digest:
                found[f"{file.home}/{file.name}"] = checked.digest
            progress.update(file.path.stat().st_size)
    if wish.write and not any(faults.values()):
        write_json(target, {"files": {name: found[name]._asdict() for name in sorted(found)}})
    return {path: Checked(counts[path], tuple(sorted(faults[path]))) for path in faults}


def check_file(file: File) -> Checked:
    """Reads one file."""
    counts: Counter[str] = Counter(files=1, file_bytes=file.path.stat().st_size)
    faults: list[str] = []
    if file.sha256 and file_sha256(file.path) != file.sha256:
        faults.append(f"{file.path} is damaged, or was changed since its manifest was written; restore it")
    read = {".parquet": _read_parquet, ".jsonl": _read_lines}.get(file.path.suffix, _read_shard)
    for record in read(file, faults):
        faults += _inspect(record, file, counts)
    is_written = file.wish.write and file.path.suffix in (".parquet", ".jsonl") and not faults
    return Checked(counts, tuple(faults), file_digest(file.path) if is_written else None)


def _list_files(group: Group, wish: Wish, digests: str | pathlib.Path | None,
                faults: list[str]) -> Iterator[File]:
    """Args: digests None: what is about to be written anew is not what files are measured by."""
    paths, lengths = list(group.files), {}
    suffix, config = paths[0].suffix if paths else "", _find_config(group, wish.config)
    if not paths:
        paths = sorted(path for path in group.folder.iterdir() if path.is_file())
        try:
            lengths = {path.name: length for path, length in zip(*list_shards(group.folder))}
        except ValueError as error:
            faults.append(str(error))
    recorded = compare_recorded(group.folder, paths, suffix=suffix, digests=digests)
    faults += recorded.faults
    for path in paths:
        name = path.relative_to(group.folder).as_posix()
        yield File(path, group.folder, config, group.path, wish, recorded.files.get(name),
                   recorded.sha256.get(name, ""), lengths.get(name, 0))


def _find_config(group: Group, config: DataConfig) -> GroupConfig:
    """The mixture's of this name, or else one of the kind that the files are of."""
    named = group_of(config, group.mode)
    if named in config.groups or not group.files:
        return named
    try:
        kind = find_kind(group.folder)[0]
    except ValueError:
        kind = None  # a broken file is named when it is read
    return dataclasses.replace(named, kind=kind or named.kind)


def _read_parquet(file: File, faults: list[str]) -> Iterator[Record]:
    columns = COLUMNS.get(file.group.kind)
    if columns is None:
        faults.append(f"{file.path}: group {file.group.name!r} is of kind {file.group.kind!r}, which is read "
                      "from JSONL; correct its kind")
        return
    try:
        groups = list_row_groups(file.path, columns, file.recorded)
    except ValueError as error:
        faults.append(str(error))
        return
    for group in groups:
        try:
            table = read_row_group(group, columns)
        except ValueError as error:
            faults.append(str(error))
            continue
        yield from _parse(file, (functools.partial(read_row, table, group, offset)
                                 for offset in range(group.num_rows)), faults)


def _read_lines(file: File, faults: list[str]) -> Iterator[Record]:
    if file.group.kind != "vision_language":
        faults.append(f"{file.path}: group {file.group.name!r} is of kind {file.group.kind!r}, which is read "
                      "from parquet; set its kind to 'vision_language'")
        return
    if file.recorded and file_sha256(file.path) != file.recorded.footer:
        faults.append(f"{file.path} is damaged, or was changed since its digest was written; restore it, or "
                      "pass --write if all is well")
    try:
        spans = find_lines(file.path)
    except ValueError as error:
        faults.append(str(error))
        return
    yield from _parse(file, (functools.partial(read_line, file.path, span) for span in spans), faults)


def _parse(file: File, reads: Iterable[Callable[[], Row | Line]], faults: list[str]) -> Iterator[Record]:
    """The records of rows or lines, each read by a call of its own; what is wrong goes to `faults`."""
    parse = make_parser(file.group.kind, file.folder, mode=file.group.name, limits=limits_of(file.wish.config))
    for read in reads:
        try:
            yield parse(read())
        except ValueError as error:
            faults.append(str(error))


def _read_shard(file: File, faults: list[str]) -> Iterator[Record]:
    if not file.length:
        return  # what lies beside the shards of a data set
    try:
        reader = open_shard(file.path, length=file.length)
    except ValueError as error:
        faults.append(str(error))
        return
    for row in range(file.length):
        try:
            yield read_record(reader, row, mode=file.group.name, place=f"{file.path} record {row}",
                              limits=limits_of(file.wish.config))
        except ValueError as error:
            faults.append(str(error))


def _inspect(record: Record, file: File, counts: Counter[str]) -> list[str]:
    """What is wrong with a record; it is counted."""
    wish = file.wish
    pictures = [part for part in record.parts if isinstance(part, ImagePart)]
    counts.update(records=1, parts=len(record.parts), images=len(pictures))
    if file.path.suffix == ".jsonl":
        counts["file_bytes"] += sum(len(part.data) for part in pictures)  # files beside it
    faults = find_faults(record, wish.config, decode=wish.decode)
    prompt = wish.config.system_prompt_of(file.group)
    try:
        check_opening(record, prompt)
    except ValueError as error:
        faults.append(str(error))
    if faults or not wish.tokenizer:
        return faults
    items, faults = measure_record(record, wish.config, open_tokenizer(wish.tokenizer), group=file.group)
    if items is None:
        return faults
    cost = Cost(*items[:, 1:].sum(axis=0).tolist())
    counts.update(text=cost.text, vit=cost.vit, latent=cost.latent)
    table = CostTable(items, np.array([0, len(items)])).opened_by(count_system_tokens(
        wish.config, file.group, open_tokenizer(wish.tokenizer)))
    return [f"{record.place}: the record fits no pack ({reason})"
            for _, reason in find_oversize(table, group=file.group, config=wish.config)]


def describe(groups: Mapping[str, Checked]) -> Iterator[str]:
    """Lines for people: what each group holds, and its faults by cause."""
    for path, checked in groups.items():
        counts = Counter(checked.counts)
        tokens = "".join(f", {counts[name]:,} {name}" for name in ("text", "vit", "latent") if counts[name])
        yield (f"{path}: {counts['records']:,} records of {counts['parts']:,} parts with {counts['images']:,} "
               f"images{tokens and tokens + ' tokens'} in {counts['files']:,} files of "
               f"{counts['file_bytes'] / 2**20:,.1f} MiB")
        causes = defaultdict(list)
        for fault in checked.faults:
            causes[find_cause(fault)].append(fault)
        for cause, faults in sorted(causes.items()):
            yield f"  {len(faults)} faults, cause {cause}:"
            yield from (f"    {fault}" for fault in faults)


def main(values: Any) -> None:
    config = DataConfig(source=values.dir, groups=(GroupConfig("any"),))
    if values.config is not None:
        config = command.data_of(values.config)
    start = time.monotonic()
    groups = check(values.dir, Wish(config, values.tokenizer or "", values.decode, values.write),
                   digests=values.digests or "", workers=values.workers)
    print("\n".join(describe(groups)))
    total = sum((Counter(checked.counts) for checked in groups.values()), Counter())
    faults = sum(len(checked.faults) for checked in groups.values())
    seconds = time.monotonic() - start
    size = total["file_bytes"] / 2**30
    rate = f" ({seconds / size:.0f} s a GiB)" if size > 0.1 else ""  # of less, starting takes longest
    print(f"{total['records']:,} records, {faults} faults, {size:.2f} GiB in {seconds:.1f} s{rate}")
    if faults:
        raise ValueError(f"{faults} faults in {values.dir!r}, listed above"
                         + ("; no digests were written" if values.write else ""))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--dir={sys.argv[1]}"  # the one argument that needs no name
    flags.DEFINE_string("dir", None, "Folder of the data set; also the first argument.")
    command.define_config("A training configuration, whose limits and budgets count.")
    flags.DEFINE_string("tokenizer", None, "tokenizer.json; with it, records that fit no pack are found.")
    flags.DEFINE_bool("decode", True, "Decode every image; without, headers alone.")
    flags.DEFINE_bool("write", False, "Record digests of parquet and JSONL files, if all is good.")
    flags.DEFINE_string("digests", None, "The file of digests, instead of DIR/digests.json.")
    flags.DEFINE_integer("workers", 0, "Processes; 0: one for each core.", lower_bound=0)
    flags.mark_flags_as_required(["dir"])
    command.run(main)
