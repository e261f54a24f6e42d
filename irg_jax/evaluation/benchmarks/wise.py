"""WISE: prompts that only hint at what is to be drawn, judged by a model that is told. One image each of 1,000.

Two versions that cannot be compared: `legacy`, which the paper and BAGEL report, three marks of 0 to 2 by
GPT-4o; and `verified` (2026), changed prompts and one mark of 0 or 1 by Qwen3.5-35B-A3B.

`overall` of legacy weighs categories by their prompts, as the benchmark defines it. BAGEL's and IRG's copies of
the script took the plain mean of six; `overall (plain mean)` is that, for comparison with their tables.

Source: Niu et al., arXiv 2503.07265; github.com/PKU-YuanGroup/WISE.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, Scoring, find, read_records
from irg_jax.evaluation.intervals import Group

FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
LEGACY = {"cultural": 400, "time": 167, "space": 133, "biology": 100, "physics": 100, "chemistry": 100}
VERIFIED = {"cultural": 400, "time": 120, "space": 120, "biology": 120, "physics": 120, "chemistry": 120}
MARKS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}    # weights; each mark is 0 to 2
SCORES = "scores.jsonl"
PLAIN = "overall (plain mean)"


def _read(folder: pathlib.Path, *, counts: Mapping[str, int], suffix: str, home: str) -> list[Prompt]:
    fields = {"Prompt": str, "Explanation": str, "prompt_id": int}
    records = []
    for file in FILES:
        name = f"{file}{suffix}.json"
        records += read_records(find(folder, f"{home}/{name}", f"data/{name}", name), fields)
    ends = np.cumsum(list(counts.values()))
    prompts = []
    for record in sorted(records, key=lambda record: record["prompt_id"]):
        number = record["prompt_id"]
        if not 1 <= number <= ends[-1]:
            raise ValueError(f"{folder}: prompt_id {number} is not in 1 to {ends[-1]}; these are other prompts")
        category = list(counts)[int(np.searchsorted(ends, number))]
        prompts.append(Prompt(str(number), category, record["Prompt"], record))
    return prompts


def _paths(prompt: Prompt, system: str) -> tuple[str, ...]:
    return (f"{system}/{prompt.id}.png",)


def score_legacy(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of lines with `prompt_id` and three marks. Raises: ValueError if one is missing, or not 0 to 2."""
    def mark(record: Mapping[str, Any]) -> float:
        return sum(weight * record[name] for name, weight in MARKS.items()) / 2
    scoring = _score(prompts, results, systems, LEGACY, dict.fromkeys(MARKS, 2), mark)
    plain = dict.fromkeys(scoring.groups, 1 / len(scoring.groups))
    return scoring._replace(columns={**scoring.columns, PLAIN: plain})


def score_verified(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of lines with `prompt_id` and a `score` of 0 or 1. Raises: as `score_legacy`."""
    return _score(prompts, results, systems, VERIFIED, {"score": 1}, lambda record: record["score"])


def _score(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str],
           counts: Mapping[str, int], most: Mapping[str, int],
           mark: Callable[[Mapping[str, Any]], float]) -> Scoring:
    got = np.stack([[mark(record) for record in _read_marks(prompts, results / system, most)]
                    for system in systems])
    categories = np.array([prompt.category for prompt in prompts])
    groups = {name: Group(got[:, categories == name], np.ones((categories == name).sum()))
              for name in dict.fromkeys(categories)}
    # By the benchmark's own counts, also where the judge left a prompt without a mark.
    all_counts = sum(counts[name] for name in groups)
    columns = {name: {name: 1.0} for name in groups}
    columns["overall"] = {name: counts[name] / all_counts for name in groups}
    return Scoring(groups, columns, got)


def _read_marks(prompts: Sequence[Prompt], folder: pathlib.Path, most: Mapping[str, int]
                ) -> list[dict[str, Any]]:
    """The marks of all prompts, in their order, from whatever .jsonl files of scores the folder holds."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*scores*.jsonl")):
        for number, record in enumerate(read_records(path, {"prompt_id": int} | dict.fromkeys(
                most, (int, float))), 1):
            wrong = [name for name, top in most.items()
                     if isinstance(record[name], bool) or not 0 <= record[name] <= top]
            if wrong or str(record["prompt_id"]) in found:
                raise ValueError(f"{path}, line {number}: prompt_id {record['prompt_id']} occurs twice, or its "
                                 f"{', '.join(wrong) or 'mark'} is not in 0 to {max(most.values())}")
            found[str(record["prompt_id"])] = record
    missing = [prompt.id for prompt in prompts if prompt.id not in found]
    if missing:
        raise ValueError(f"{folder} lacks the marks of {len(missing)} prompts, {', '.join(missing[:10])}; let "
                         "the judge finish")
    return [found[prompt.id] for prompt in prompts]


_NUMBER = r"[*\s]*[:\uff1a]?[*\s]*(\d+(?:[.,]\d+)?)"
_MARK = re.compile(r"(consistency|realism|aesthetic quality)" + _NUMBER, re.IGNORECASE)
_SCORE = re.compile(r"\bscore\b" + _NUMBER, re.IGNORECASE)


def read_legacy_answer(text: str) -> dict[str, Any]:
    """The three marks of an answer, what it thought left out.

    Raises: ValueError if one is missing, told as two numbers, or none of 0, 1 and 2.
    """
    found = {(name.lower().replace(" ", "_"), mark) for name, mark in _MARK.findall(_said(text))}
    if sorted(name for name, _ in found) != sorted(MARKS) or not {mark for _, mark in found} <= {"0", "1", "2"}:
        raise ValueError(f"not three marks of 0 to 2: {text[:200]!r}")
    return {name: int(mark) for name, mark in found}


def read_verified_answer(text: str) -> dict[str, Any]:
    """The mark of an answer, what it thought left out. Raises: ValueError if it is not one of 0 and 1."""
    said = _said(text)
    found = _SCORE.findall(said) or re.findall(r"(?m)^\s*([01])\s*$", said)
    if len(set(found)) != 1 or found[0] not in ("0", "1"):
        raise ValueError(f"not one score of 0 or 1: {text[:200]!r}")
    return {"score": int(found[0])}


def _said(text: str) -> str:
    return re.sub(r"(?s).*</think>", "", text)


def _protocol(version: str, counts: Mapping[str, int], suffix: str, home: str,
              score: Callable[..., Scoring], formula: str) -> Protocol:
    return Protocol(
        name="wise", version=version, counts=counts, images=1, formula=formula, paths=_paths, score=score,
        source=f"{', '.join(f'{file}{suffix}.json' for file in FILES)} of github.com/PKU-YuanGroup/WISE, "
               f"folder {home}",
        read=functools.partial(_read, counts=counts, suffix=suffix, home=home),
        howto="this command with --judge URL --judge_model MODEL, or the official script on "
              "{official}/{system}, its *_scores_results.jsonl copied to {results}/{system}/")


PROTOCOLS = (
    _protocol("legacy", LEGACY, "", "WISE_legacy/data", score_legacy,
              "(0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2; overall is the mean over prompts, "
              "so that categories weigh 0.4, 0.167, 0.133, 0.1, 0.1, 0.1; the plain mean of six is beside it"),
    _protocol("verified", VERIFIED, "_verified", "data_verified", score_verified,
              "share of prompts with score 1; overall is the mean over prompts, so that categories weigh 0.4 "
              "and five times 0.12"))
