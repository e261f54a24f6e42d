"""OneIG-Bench, English: five scores by five models. Four images of each of 1,120 prompts, one grid a prompt.

The official scripts score the folders; their tables are read here. None of them states an overall score; the
one that is reported everywhere, here too, is the plain mean of the five.

Source: Chang et al., arXiv 2506.07977; github.com/OneIG-Bench/OneIG-Benchmark.
"""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, Scoring, find, read_table
from irg_jax.evaluation.intervals import Group

FOLDERS = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object",
           "Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
COUNTS = {"anime": 245, "human": 244, "object": 206, "text": 200, "reasoning": 225}
METRICS = {"alignment": "alignment", "text": "text score", "reasoning": "reasoning", "style": "style",
           "diversity": "total average"}    # and the column that holds it
AGREED = 2e-3    # tables are rounded


def _read(folder: pathlib.Path) -> list[Prompt]:
    path = find(folder, "OneIG-Bench.csv")
    prompts = []
    for number, row in enumerate(read_table(path), 2):
        category, name, text = (row.get(field) or "" for field in ("category", "id", "prompt_en"))
        if category not in FOLDERS or not re.fullmatch(r"\d{1,6}", name, re.ASCII) or not text:
            raise ValueError(f"{path}, row {number}: needs a category ({', '.join(FOLDERS)}), an id of digits "
                             "and prompt_en")
        prompts.append(Prompt(f"{FOLDERS[category]}_{name}", FOLDERS[category], text, {"id": name}))
    return prompts


def _paths(prompt: Prompt, system: str) -> tuple[str, ...]:
    return (f"images/{prompt.category}/{system}/{prompt.details['id']}.webp",)


def score(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of the tables RESULTS/<system>/<metric>_score_EN_<time>.csv, the newest of each.

    They hold one number a model; where the official <metric>_prompt_score_EN_<time>.csv is there for all
    systems, and has as many prompts, the column has an interval. Not the text score, which is no mean.

    Raises: ValueError if a table is missing, or the two kinds do not agree.
    """
    groups, shares = {}, np.full((len(systems), len(prompts)), np.nan)
    names = {prompt.id: number for number, prompt in enumerate(prompts)}
    for metric, column in METRICS.items():
        means = np.array([[_read_score(results / system, metric, column, system)] for system in systems])
        single = [_read_prompts(results / system, metric, system) for system in systems]
        if metric == "text" or not all(single) or len({tuple(sorted(each)) for each in single}) > 1:
            groups[metric] = Group(means, np.ones(1))
            continue
        got = np.array([[each[name] for name in sorted(single[0])] for each in single])
        if np.abs(got.mean(1, keepdims=True) - means).max() > AGREED:
            raise ValueError(f"{results}: the tables of {metric} by model and by prompt do not agree; remove "
                             "those of another run")
        groups[metric] = Group(got, np.ones(got.shape[1]))
        if metric == "alignment":
            known = [name for name in sorted(single[0]) if name in names]
            shares[:, [names[name] for name in known]] = [[each[name] for name in known] for each in single]
    columns = {metric: {metric: 1.0} for metric in METRICS}
    overall = dict.fromkeys(METRICS, 1 / len(METRICS))
    return Scoring(groups, columns | {"overall": overall}, shares)


def _read_prompts(folder: pathlib.Path, metric: str, system: str) -> dict[str, float]:
    """Scores by prompt; empty if there is no such table, or it holds none of the system."""
    tables = sorted(folder.glob(f"{metric}_prompt_score_EN_*.csv"))
    try:
        return {row[""]: float(row[system]) for row in read_table(tables[-1])} if tables else {}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{tables[-1]}: the column {system!r} is missing, or no number ({error})") from error


def _read_score(folder: pathlib.Path, metric: str, column: str, system: str) -> float:
    tables = sorted(folder.glob(f"{metric}_score_EN_*.csv"))
    if not tables:
        raise ValueError(f"{folder} lacks {metric}_score_EN_*.csv; run the official script of {metric}")
    rows = [row for row in read_table(tables[-1]) if system in list(row.values())[:1]]
    try:
        value = float(rows[0][column]) if len(rows) == 1 else float("nan")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{tables[-1]}: the column {column!r} of {system} holds no number") from error
    if not 0 <= value <= 1:
        raise ValueError(f"{tables[-1]}: needs one row of {system}, with a score of 0 to 1 in {column!r}")
    return value


PROTOCOLS = (Protocol(
    name="oneig", version="en", counts=COUNTS, images=4, read=_read, paths=_paths, score=score,
    source="OneIG-Bench.csv of github.com/OneIG-Bench/OneIG-Benchmark",
    formula="alignment, text, reasoning, style and diversity by the official scripts; overall is their plain "
            "mean",
    howto="the five scripts of OneIG-Benchmark with MODE=EN, IMAGE_DIR={official}/images, "
          "MODEL_NAMES={system}, IMAGE_GRID=\"2,2\", their results/*_score_EN_*.csv copied to "
          "{results}/{system}/"),)
