"""Scores and intervals against scipy, an independent loop, and numbers worked out by hand."""

import pathlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from irg_jax.evaluation.results import SYSTEMS, Result
from irg_jax.evaluation.statistics import (
    align_verdicts,
    classify_outcomes,
    paired_bootstrap,
    score_table,
    summarize_stage,
)


def make_result(name: str, system: str, correct: bool, category: str = "counting") -> Result:
    image = pathlib.Path("x.png")
    return Result(name, category, f"prompt {name}", system, correct, (), (), image, "")


def test_interval_agrees_with_scipy():
    generator = np.random.default_rng(3)
    a, b = generator.random(120) < 0.7, generator.random(120) < 0.5
    ours = paired_bootstrap(a, b, seed=0, num_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (a.astype(float), b.astype(float)), lambda x, y, axis: (x - y).mean(axis), paired=True,
        vectorized=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
    assert ours.mean == pytest.approx(a.mean() - b.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)


def test_stratified_interval_agrees_with_a_plain_loop():
    generator = np.random.default_rng(5)
    strata = np.repeat(["few", "many"], [12, 90])
    a, b = generator.normal(0.4, 1, 102), generator.normal(0.0, 1, 102)
    resampled = []
    for _ in range(4000):
        means = []
        for label in ("few", "many"):
            index = generator.choice(np.flatnonzero(strata == label), (strata == label).sum())
            means.append((a[index] - b[index]).mean())
        resampled.append(np.mean(means))
    ours = paired_bootstrap(a, b, strata=strata, seed=0)
    spread = np.std(resampled)
    assert ours.low == pytest.approx(np.percentile(resampled, 2.5), abs=0.15 * spread)
    assert ours.high == pytest.approx(np.percentile(resampled, 97.5), abs=0.15 * spread)
    # Twelve prompts weigh as much as ninety: pooling them would give another, narrower interval.
    pooled = paired_bootstrap(a, b, seed=0)
    assert ours.high - ours.low > 1.2 * (pooled.high - pooled.low)


def test_pairing_matters():
    right = np.random.default_rng(0).random(200) < 0.5
    better = right.copy()
    better[np.flatnonzero(~right)[:10]] = True
    paired = paired_bootstrap(better, right, seed=0)
    broken = paired_bootstrap(np.random.default_rng(1).permutation(better), right, seed=0)
    assert paired.low > 0 and paired.high < 0.1
    assert broken.low < 0 < broken.high


def test_interval_covers_the_truth_about_95_times_in_100():
    generator, covered = np.random.default_rng(11), 0
    for trial in range(400):
        a, b = generator.random((2, 150)) < np.array([[0.6], [0.45]])
        interval = paired_bootstrap(a, b, seed=trial, num_resamples=1000)
        covered += interval.low <= 0.15 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("xyz")), min_size=1),
       st.integers(0, 2**32))
def test_interval_is_reproducible_antisymmetric_and_bounded(rows, seed):
    a, b, strata = zip(*rows, strict=True)
    one = paired_bootstrap(a, b, strata=strata, seed=seed, num_resamples=500)
    assert one == paired_bootstrap(a, b, strata=strata, seed=seed, num_resamples=500)
    assert paired_bootstrap(b, a, strata=strata, seed=seed, num_resamples=500).mean == -one.mean
    # Sums of a few floats may stray by rounding when every resample is the same.
    assert -1 - 1e-9 <= one.low <= one.high <= 1 + 1e-9


@pytest.mark.parametrize("a, b, strata", [([1], [1, 0], None), ([], [], None), ([1], [0], "xy")])
def test_bootstrap_refuses_lengths_that_differ(a, b, strata):
    with pytest.raises(ValueError, match="one value a prompt"):
        paired_bootstrap(a, b, seed=0, strata=strata)


def test_overall_is_the_mean_of_the_categories():
    results = [make_result(str(n), "turn1", n == 0, "counting") for n in range(4)]
    results += [make_result("last", "turn1", True, "position")]
    assert score_table(results) == {"turn1": {"overall": 0.625, "counting": 0.25, "position": 1.0}}


def test_scores_agree_with_counting_by_hand():
    generator = np.random.default_rng(2)
    results = [make_result(f"{n}", system, bool(generator.random() < 0.5), f"c{n % 3}")
               for n in range(50) for system in SYSTEMS]
    table = score_table(results)
    for system in SYSTEMS:
        for category in ("c0", "c1", "c2"):
            chosen = [r.correct for r in results if (r.system, r.category) == (system, category)]
            assert table[system][category] == pytest.approx(sum(chosen) / len(chosen))


def test_incomplete_results_are_refused_by_name():
    results = [make_result(name, system, True) for name in ("7", "8") for system in SYSTEMS]
    del results[5]
    with pytest.raises(ValueError, match="8 by self_cot"):
        score_table(results)


def test_outcomes_tell_fixes_from_breaks():
    sides = {"a": (False, True), "b": (True, False), "c": (True, True), "d": (False, False)}
    results = [make_result(name, system, side[index]) for name, side in sides.items()
               for index, system in enumerate(("turn1", "turn2"))]
    assert classify_outcomes(align_verdicts(results)) == {
        "fixed": ("a",), "broken": ("b",), "both_right": ("c",), "both_wrong": ("d",)}


def test_stage_summary_takes_the_last_tenth_and_the_median():
    metrics = {name: np.arange(20.0) for name in ("step", "loss", "ce", "mse", "tokens_per_second")}
    metrics["step_seconds"] = np.array([99.0] + 19 * [0.5])
    assert summarize_stage(metrics) == {"steps": 20, "loss": 18.5, "ce": 18.5, "mse": 18.5,
                                        "tokens_per_second": 9.5, "step_seconds": 0.5}
