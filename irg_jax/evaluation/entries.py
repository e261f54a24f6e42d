"""An evaluated folder as a row or more of a table, whichever benchmark it is of; nothing in it is trusted."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from irg_jax.evaluation.files import OBJECT, TEXT, check, is_inside, is_number, parse, read_bytes
from irg_jax.evaluation.intervals import Group, as_json, score_columns
from irg_jax.evaluation.results import read_manifest, read_results
from irg_jax.evaluation.statistics import align_verdicts

TABLE = "scores.json"    # as `benchmarks/running.py` writes it


class Entry(NamedTuple):
    """A run of a benchmark: {system: {column: {mean, ci95}}}, and by prompt what each system got, 0 to 1."""

    label: str
    benchmark: tuple[str, str]    # and version
    table: Mapping[str, Mapping[str, Any]]
    difference: Mapping[str, Any]
    texts: Mapping[str, str]      # of prompts by id
    by_prompt: Mapping[str, Mapping[str, float]]
    pictures: Mapping[str, Mapping[str, pathlib.Path]]    # {system: {id: file}}
    facts: Mapping[str, str]

    @property
    def systems(self) -> tuple[str, ...]:
        return tuple(self.table)


def read_entry(folder: str | pathlib.Path, label: str) -> Entry:
    """An OUT of `irg_jax.evaluate`, scored. Raises: ValueError if it is none, or its files are broken."""
    folder = pathlib.Path(folder)
    if (folder / "results.jsonl").is_file():
        return _read_shapes(folder, label)
    if not (folder / TABLE).is_file():
        raise ValueError(f"{str(folder)!r} holds no scores ({TABLE}, or results.jsonl of shapes); evaluate "
                         "first")
    return _read_scores(folder, label)


def _read_shapes(folder: pathlib.Path, label: str) -> Entry:
    manifest, results = read_manifest(folder / "manifest.json"), read_results(folder / "results.jsonl")
    verdicts = align_verdicts(results)
    systems, categories = tuple(verdicts.correct), verdicts.categories
    right = np.stack([verdicts.correct[system] for system in systems]).astype(float)
    groups = {name: Group(right[:, categories == name], np.ones((categories == name).sum()))
              for name in dict.fromkeys(categories)}
    columns = {name: {name: 1.0} for name in groups} | {"overall": dict.fromkeys(groups, 1 / len(groups))}
    told = as_json(score_columns(groups, columns), systems)
    shown: dict[str, dict[str, pathlib.Path]] = {system: {} for system in systems}
    for result in results:
        shown[result.system][result.id] = result.image
    shares = {system: dict(zip(verdicts.ids, map(float, values))) for system, values in zip(systems, right)}
    facts = {"seed": str(manifest.seed), "prompts": str(manifest.prompts),
             "formula": "share of right images of each category; overall is the mean of categories"}
    return Entry(label, ("shapes", "held out"), told["systems"], told.get("difference", {}),
                 {result.id: result.prompt for result in results}, shares, shown, facts)


def _read_scores(folder: pathlib.Path, label: str) -> Entry:
    place = str(folder / TABLE)
    table = parse(read_bytes(folder / TABLE), place)
    check(table, {"benchmark": TEXT, "version": TEXT, "formula": TEXT, "systems": OBJECT, "by_prompt": OBJECT,
                  "texts": OBJECT, "judges": OBJECT}, place, extra=True)
    systems = table["systems"]
    columns, shares = [*systems.values(), table.get("difference", {})], list(table["by_prompt"].values())
    is_sound = (systems and all(isinstance(values, dict) for values in columns + shares)
                and all(_is_score(score) for column in columns for score in column.values())
                and all(is_number(share) for values in shares for share in values.values())
                and all(isinstance(text, str) for text in table["texts"].values())
                and set(table["by_prompt"]) <= set(systems))
    if not is_sound:
        raise ValueError(f"{place}: holds no table of scores; evaluate again")
    pictures = {system: {name: path for number, name in enumerate(table["texts"])
                         if (path := _picture(folder, number * _images(table, place), turn))}
                for turn, system in enumerate(systems, 1)}
    judges = {f"{judge.get('model')} by {judge.get('wording')}" for judge in table["judges"].values()
              if isinstance(judge, dict)}
    limited = " (a part of the benchmark: no score of it)" if table.get("limit") else ""
    facts = {"seed": str(table.get("seed")), "prompts": f"{table.get('prompts')}{limited}",
             "formula": table["formula"],
             **({"judge": ", ".join(sorted(judges))} if judges else {})}
    return Entry(label, (table["benchmark"], table["version"]), systems, table.get("difference", {}),
                 table["texts"], table["by_prompt"], pictures, facts)


def _is_score(value: Any) -> bool:
    ends = value.get("ci95", 0) if isinstance(value, dict) else 0
    return isinstance(value, dict) and is_number(value.get("mean")) and (
        ends is None or isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)))


def _images(table: Mapping[str, Any], place: str) -> int:
    count = table.get("images_per_prompt")
    if type(count) is not int or not 1 <= count <= 16:
        raise ValueError(f"{place}: field 'images_per_prompt' is {str(count)[:40]!r}; evaluate again")
    return count


def _picture(folder: pathlib.Path, number: int, turn: int) -> pathlib.Path | None:
    """The first image of a prompt: that of the turn, or of the last there is."""
    for made in range(turn, 0, -1):
        path = folder / "samples" / f"{number:04d}" / f"turn{made}.png"
        if not is_inside(path, folder):
            raise ValueError(f"{path}: leads out of the folder; put the image itself there")
        if path.is_file():
            return path
    return None
