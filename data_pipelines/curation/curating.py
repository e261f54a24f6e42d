"""A whole curation: read, screen, estimate, ask, write."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from data_pipelines.curation import estimate as estimates
from data_pipelines.curation.cases import Screened, read_lines, screen
from data_pipelines.curation.collecting import Collector
from data_pipelines.curation.config import CurateConfig
from data_pipelines.curation.estimate import Expense
from data_pipelines.curation.gathering import CASE, Gathered, gather
from data_pipelines.curation.material import Case, Rejected, Rejection
from data_pipelines.curation.opening import Opened, describe_config, open_crew
from data_pipelines.digests import MANIFEST, file_sha256, write_json
from data_pipelines.endpoints import Endpoint, in_parallel
from data_pipelines.jobs import show_progress
from data_pipelines.manifests import alone, digest_files, is_built, list_files, partial_folder, publish
from data_pipelines.shapes.crew import understand
from data_pipelines.shapes.records import generator

ANSWERS = ".answers"    # what the folder beside OUT ends in that keeps what endpoints answered


class Curated(NamedTuple):
    """What a curation did."""

    written: bool                    # False: OUT held exactly this data set
    counts: dict[str, int]           # records of each mode
    cases: dict[str, int]            # read, told whole, told partly, rejected
    rejections: dict[str, int]       # by cause
    asked: dict[str, str]            # by endpoint, what it was asked in this run, in words


class Draft(NamedTuple):
    """A curation before anything is asked."""

    config: CurateConfig
    opened: Opened
    screened: Screened
    wanted: dict[str, Any]           # what the data set is: the part of its manifest that is known
    expenses: list[Expense]


def answers_folder(out: pathlib.Path) -> pathlib.Path:
    """Where answers are kept; it outlives any end, and may be removed when the data set will do."""
    return out.with_name(f"{out.name}{ANSWERS}")


def prepare(config: CurateConfig, *, out: str | pathlib.Path) -> Draft:
    """Reads and checks all that can be known without asking.

    Raises: ValueError naming what is missing or wrong.
    """
    path = pathlib.Path(config.prompts)
    lines = read_lines(path, licence=config.licence)
    opened = open_crew(config, answers_folder(pathlib.Path(out)))
    screened = screen(lines, folder=path.parent, rules=opened.plan.rules)
    if config.critic.kind == "shapes":
        screened = _understand_all(screened, seed=config.seed)
    wanted = {"source": "curate", "format": "parquet", "config": describe_config(config),
              "templates": opened.templates.digests, "inputs": _describe_inputs(config, screened.cases)}
    expenses = estimates.estimate(screened.cases, config=config, templates=opened.templates, crew=opened.crew,
                                  plan=opened.plan)
    return Draft(config, opened, screened, wanted, expenses)


def curate(draft: Draft, *, out: str | pathlib.Path, overwrite: bool = False) -> Curated:
    """Asks for what is missing, and writes the data set `out`, whole or not at all.

    Interrupted in any way, the same call goes on: what was answered is kept in `answers_folder`.

    Raises: EndpointError, BudgetSpent; ValueError if `out` holds anything else, if another process curates into
        it, or if nothing at all was taken.
    """
    answers = answers_folder(pathlib.Path(out))
    out = pathlib.Path(out).resolve()    # a link stays, and leads to the data set
    if is_built(out, draft.wanted, overwrite=overwrite):
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        causes = {cause: one["count"] for cause, one in manifest["rejections"].items()}
        return Curated(False, manifest["counts"], manifest["cases"], causes, {})
    num_cases = len(draft.screened.cases) + len(draft.screened.rejections)
    endpoints = draft.opened.endpoints

    def describe(collector: Collector, folder: pathlib.Path) -> dict[str, Any]:
        if not any(collector.counts.values()):
            raise ValueError(f"none of {num_cases} cases was taken: {_list_causes(collector.causes)}; correct "
                             "the filters or the templates. What was answered is kept")
        cases = {"read": num_cases, **collector.told, "rejected": num_cases - sum(collector.told.values())}
        return {"cases": cases, "usage": {name: _describe_usage(one) for name, one in endpoints.items()},
                "versions": {name: version(name) for name in ("numpy", "pillow", "pyarrow", "scikit-image")},
                "sizes": {name: path.stat().st_size for name, path in list_files(folder).items()}}

    with alone(answers, out):
        collector, manifest = make(out, draft.wanted, collect=lambda folder: _collect(draft, folder),
                                   describe=describe)
        if not any(answers.iterdir()):    # it was held, and nobody was asked
            answers.rmdir()
    return Curated(True, collector.counts, manifest["cases"], collector.causes,
                   {name: _tell_usage(one) for name, one in endpoints.items()})


def make(out: pathlib.Path, wanted: Mapping[str, Any], *, collect: Callable[[pathlib.Path], Collector],
         describe: Callable[[Collector, pathlib.Path], dict[str, Any]]) -> tuple[Collector, dict[str, Any]]:
    """The data set `out`, whole or not at all; also how the shapes world's own is made.

    Args: wanted opens the manifest, and `describe` of what was collected ends it; collect writes records into a
        folder, in whose place `out` comes.
    Returns: what was collected, and the manifest.
    """
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)    # of a run that was killed
    partial.mkdir(parents=True)
    collector = collect(partial)
    collector.write_rejections(partial)
    manifest = {**wanted, **collector.describe(), **describe(collector, partial),
                "files": digest_files(partial)}
    write_json(partial / MANIFEST, manifest)
    publish(out)
    return collector, manifest


def _collect(draft: Draft, folder: pathlib.Path) -> Collector:
    config, opened, screened = draft.config, draft.opened, draft.screened
    home = folder / config.split if config.split else folder
    with (Collector({mode: home / f"{mode}{config.suffix}" for mode in config.modes}, seen=screened.seen,
                    rows_per_file=config.rows_per_file, rows_per_group=config.rows_per_group,
                    rejections=screened.rejections) as collector,
          show_progress(total=len(screened.cases), desc="curate", unit="case") as progress):
        for gathered in _gather_all(screened.cases, opened):
            collector.add(gathered)
            progress.update()
    return collector


def _understand_all(screened: Screened, *, seed: int) -> Screened:
    """As cases of the shapes world, each with random numbers of its own."""
    cases, rejections = [], list(screened.rejections)
    for case in screened.cases:
        try:
            cases.append(understand(case, generator(seed, "curate", case.id)))
        except Rejected as rejected:
            rejections.append(Rejection(case.id, CASE, rejected.cause, rejected.told))
    return screened._replace(cases=cases, rejections=rejections)


def _gather_all(cases: Sequence[Case], opened: Opened) -> Iterator[Gathered]:
    """In the order of the cases, however they are answered."""
    work = lambda case: gather(case, crew=opened.crew, plan=opened.plan)
    endpoints = list(opened.endpoints.values())
    yield from in_parallel(work, cases, endpoints) if endpoints else map(work, cases)


def _describe_inputs(config: CurateConfig, cases: Iterable[Case]) -> dict[str, str]:
    """Digests of what the records are made from; of folders, of the names and sizes of their files."""
    images = hashlib.sha256("".join(case.image.sha256 for case in cases if case.image).encode())
    found = {"prompts": file_sha256(config.prompts), "images": images.hexdigest()}
    for name, part in (("sketcher", config.sketcher), ("painter", config.painter), ("critic", config.critic)):
        if part.kind == "folder":
            found[name] = _digest_names(pathlib.Path(part.folder))
    return found


def _digest_names(folder: pathlib.Path) -> str:
    found = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = pathlib.Path(place, name)
            found.update(f"{path.relative_to(folder)} {path.lstat().st_size}\n".encode())
    return found.hexdigest()


def _describe_usage(endpoint: Endpoint) -> dict[str, Any]:
    """Of all runs, so that an interrupted curation has the same manifest as another."""
    usage = endpoint.usage
    return {"model": endpoint.config.model, "served": sorted(endpoint.served), "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out, "cost": round(usage.cost, 6)}


def _tell_usage(endpoint: Endpoint) -> str:
    usage = endpoint.usage
    return (f"{usage.sent:,} requests answered, {usage.kept:,} kept, {usage.repeated:,} repeated, "
            f"{usage.unparsed:,} answers not taken; {usage.cost:,.2f} spent in all")


def _list_causes(causes: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in causes.items())
