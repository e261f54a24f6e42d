"""Counts verdicts: scores as GenEval takes them, and how sure a difference is.

`overall` is the mean of the category scores, not of the prompts, so small categories weigh as much
as large ones; the bootstrap draws prompts within their category for the same reason.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from irg_jax.evaluation.results import MORE_TURNS, SYSTEMS, Result, Run
from irg_jax.evaluation.training_summary import compare_configs, summarize_files

DIFFERENCES = {"turn2_minus_turn1": ("turn2", "turn1"), "turn1_minus_base": ("turn1", "base")}
OUTCOMES = {  # name -> (is turn 1 right, is turn 2 right)
    "fixed": (False, True),
    "broken": (True, False),
    "both_right": (True, True),
    "both_wrong": (False, False),
}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean difference and the ends of its 95 % percentile interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Results by prompt: P ids and categories [P], `correct[system]` bool [P]."""

    ids: tuple[str, ...]
    categories: np.ndarray
    correct: Mapping[str, np.ndarray]


def align_verdicts(results: Sequence[Result]) -> Verdicts:
    """One row a prompt, in order of appearance; ValueError names what is missing."""
    by_key = {(result.id, result.system): result for result in results}
    first = {}
    for result in results:
        first.setdefault(result.id, result)
    present = {result.system for result in results}
    systems = [system for system in SYSTEMS + MORE_TURNS if system in present]
    missing = [f"{name} by {system}" for name in first for system in systems
               if (name, system) not in by_key]
    if missing:
        rest = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"results are incomplete: no result for {', '.join(missing[:10])}{rest}; "
                         "let the evaluation finish, then report")
    correct = {system: np.array([by_key[name, system].correct for name in first], bool)
               for system in systems}
    categories = np.array([result.category for result in first.values()], object)
    return Verdicts(tuple(first), categories, correct)


def score_table(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Per system `overall` and one score per category, each the share of correct images.

        score_table(results)["turn2"]  ->  {"overall": 0.75, "counting": 0.5, "position": 1.0}

    Raises ValueError if a prompt lacks one of the systems present.
    """
    verdicts = align_verdicts(results)
    table = {}
    for system, correct in verdicts.correct.items():
        scores = {category: float(correct[verdicts.categories == category].mean())
                  for category in dict.fromkeys(verdicts.categories)}
        table[system] = {"overall": float(np.mean(list(scores.values()))), **scores}
    return table


def paired_bootstrap(a: Sequence[float], b: Sequence[float], *, seed: int,
                     strata: Sequence[Any] | None = None, num_resamples: int = 10_000) -> Interval:
    """95 % percentile bootstrap of mean(a - b), where a[i] and b[i] belong to one prompt.

    With `strata` (one label a prompt) prompts are drawn within their stratum, and the statistic is
    the mean of the strata's means. Source: Efron and Tibshirani, An Introduction to the Bootstrap,
    chapters 8 and 13.

    Args:
      a, b: values [P], bool or float; the same prompts in the same order.
      seed: of the resampling.
      strata: labels [P]; None puts all prompts into one stratum.
      num_resamples: how often to draw.

    Raises ValueError if the lengths differ or there is no prompt.
    """
    difference = np.asarray(a, float) - np.asarray(b, float) if len(a) == len(b) else np.zeros(0)
    labels = [None] * len(difference) if strata is None else list(strata)
    if not len(difference) or len(labels) != len(difference):
        raise ValueError(f"a, b and strata must have one value a prompt, got {len(a)}, {len(b)} "
                         f"and {len(labels)}")
    groups: dict[Any, list[float]] = {}
    for label, value in zip(labels, difference, strict=True):
        groups.setdefault(label, []).append(value)

    generator = np.random.default_rng(seed)
    resampled = np.zeros(num_resamples)
    for group in groups.values():
        # n draws with replacement are one multinomial draw over the distinct values; for verdicts
        # those are -1, 0 and 1, whatever n is.
        values, counts = np.unique(group, return_counts=True)
        draws = generator.multinomial(len(group), counts / len(group), size=num_resamples)
        resampled += draws @ values / (len(group) * len(groups))
    low, high = np.percentile(resampled, [2.5, 97.5])
    mean = np.mean([np.mean(group) for group in groups.values()])
    return Interval(float(mean), float(low), float(high))


def classify_outcomes(verdicts: Verdicts) -> dict[str, tuple[str, ...]]:
    """The prompt ids that turn 2 fixed, broke, left right and left wrong."""
    pairs = zip(verdicts.ids, verdicts.correct["turn1"], verdicts.correct["turn2"], strict=True)
    sides = {name: (bool(one), bool(two)) for name, one, two in pairs}
    return {outcome: tuple(name for name, side in sides.items() if side == wanted)
            for outcome, wanted in OUTCOMES.items()}


def build_report(run: Run, *, seed: int = 0) -> dict[str, Any]:
    """What `report.json` holds; `seed` is the bootstrap's. ValueError if an evaluation lacks a system."""
    configs = compare_configs(run.stages)
    return {
        **(_judge(run, seed) if run.manifest else {}),
        "stages": {stage.name: summarize_stage(stage.metrics) | summarize_files(stage) for stage in run.stages},
        "timings": {"seconds": dict(run.timings.seconds), "peak_rss_gib": dict(run.timings.peak_rss_gib)},
        "config_differences": {row["key"]: dict(zip(configs["stages"], row["values"], strict=True))
                               for row in configs["rows"] if row["differs"]},
        "notes": list(run.notes),
    }


def summarize_stage(metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A stage in a few numbers, None if unknown: means of the last tenth of its lines, medians of speeds."""
    steps = metrics.get("step", ())
    tail = slice(-max(1, len(steps) // 10), None)
    losses = {name: _over(np.mean, metrics, name, tail) for name in ("loss", "ce", "mse")}
    speeds = {name: _over(np.median, metrics, name, slice(None))
              for name in ("tokens_per_second", "step_seconds")}
    return {"steps": int(steps[-1]) + 1 if len(steps) else 0, **losses, **speeds}


def _over(reduce: Callable[[np.ndarray], Any], metrics: Mapping[str, np.ndarray], name: str,
          lines: slice) -> float | None:
    values = metrics[name][lines] if name in metrics else np.zeros(0)
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else None


def _judge(run: Run, seed: int) -> dict[str, Any]:
    """The part of the report that an evaluation is needed for."""
    scores = score_table(run.results)
    absent = [system for system in SYSTEMS if system not in scores]
    if absent:
        raise ValueError(f"results hold no image by {', '.join(absent)}; evaluate all four systems")
    verdicts = align_verdicts(run.results)
    everyone = np.ones(len(verdicts.ids), bool)
    overall, by_category = {}, {}
    for name, systems in DIFFERENCES.items():
        overall[name] = _difference(verdicts, systems, everyone, seed)
        by_category[name] = {
            category: _difference(verdicts, systems, verdicts.categories == category, seed)
            for category in dict.fromkeys(verdicts.categories)}
    manifest, timings = run.manifest, run.timings
    return {
        "prompts": manifest.prompts,
        **scores,
        **overall,
        "differences_by_category": by_category,
        "outcomes": {name: len(ids) for name, ids in classify_outcomes(verdicts).items()},
        "seconds": float(sum(timings.seconds.values()) or manifest.seconds),
        "peak_rss_gib": float(max([manifest.peak_rss_gib, *timings.peak_rss_gib.values()])),
        "seed": manifest.seed,
        "checkpoints": manifest.checkpoints,
        "settings": manifest.settings,
        "versions": manifest.versions,
        "command": manifest.command,
    }


def _difference(verdicts: Verdicts, systems: tuple[str, str], chosen: np.ndarray,
                seed: int) -> dict[str, Any]:
    a, b = (verdicts.correct[system][chosen] for system in systems)
    interval = paired_bootstrap(a, b, seed=seed, strata=verdicts.categories[chosen])
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}
