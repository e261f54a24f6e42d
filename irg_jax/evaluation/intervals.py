"""Scores that are sums of shares, with the intervals that the choice of prompts leaves.

A group is a set of prompts; its score is what all got over what all could have got: images that are right, or
questions answered as they should be. A column of a table is a weighted sum of groups: a mean of six categories,
or of nine leaves that are means of types.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

NUM_RESAMPLES = 4000


class Group(NamedTuple):
    """What S systems got with each of P prompts, [S, P], of what could be got, [P], above zero."""

    got: np.ndarray
    of: np.ndarray


class Column(NamedTuple):
    """Of S systems the score and the ends of its 95 % interval, [S]; then those of the last minus the first."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    difference: tuple[float, float, float]


def score_columns(groups: Mapping[str, Group], columns: Mapping[str, Mapping[str, float]], *,
                  seed: int = 0) -> dict[str, Column]:
    """Every column, and its percentile bootstrap over prompts, drawn within their group.

    All systems are drawn with the same prompts, so that a difference is a paired one. Groups of one column are
    drawn independently: exact where they share no prompt. A group of one prompt tells nothing of others: the
    ends are NaN.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13.
    Raises: ValueError if a group is empty, or something is no number.
    """
    scores, resampled = {}, {}
    for number, (name, group) in enumerate(sorted(groups.items())):
        got, of = np.asarray(group.got, float), np.asarray(group.of, float)
        if not of.size or not np.isfinite(got).all() or not (of > 0).all():
            raise ValueError(f"group {name!r} has no prompts, or a score that is no number")
        scores[name] = got.sum(1) / of.sum()
        generator = np.random.default_rng((seed, number))
        draws = generator.multinomial(len(of), np.full(len(of), 1 / len(of)), size=NUM_RESAMPLES)
        resampled[name] = draws @ got.T / (draws @ of)[:, None]
        if len(of) < 2:
            resampled[name][:] = np.nan
    return {column: _combine(weights, scores, resampled) for column, weights in columns.items()}


def as_json(columns: Mapping[str, Column], systems: tuple[str, ...]) -> dict[str, Any]:
    """{system: {column: {"mean", "ci95"}}}, and {"difference": ...} of the last minus the first system."""
    table: dict[str, Any] = {
        system: {name: _told(column.mean[i], column.low[i], column.high[i]) for name, column in columns.items()}
        for i, system in enumerate(systems)}
    differences = {name: _told(*column.difference) for name, column in columns.items()}
    return {"systems": table} | ({"difference": differences} if len(systems) > 1 else {})


def tell_score(score: Mapping[str, Any], *, is_percent: bool = False, is_difference: bool = False) -> str:
    """0.850 [0.820, 0.880], or 85.00 [82.00, 88.00] of the same; with signs if it is a difference."""
    factor, digits, sign = 100 if is_percent else 1, 2 if is_percent else 3, "+" if is_difference else ""
    values = (score["mean"], *(score["ci95"] or ()))
    mean, *ends = (f"{factor * value:{sign}.{digits}f}" for value in values)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _told(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": float(mean), "ci95": None if np.isnan(low) else [float(low), float(high)]}


def _combine(weights: Mapping[str, float], scores: Mapping[str, np.ndarray],
             resampled: Mapping[str, np.ndarray]) -> Column:
    mean = sum(weight * scores[name] for name, weight in weights.items())
    drawn = sum(weight * resampled[name] for name, weight in weights.items())
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    ends = np.percentile(drawn[:, -1] - drawn[:, 0], [2.5, 97.5])
    return Column(mean, low, high, (float(mean[-1] - mean[0]), float(ends[0]), float(ends[1])))
