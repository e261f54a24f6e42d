"""Scores of groups and columns, against sums in plain Python and the theory of means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irg_jax.evaluation.intervals import Group, as_json, score_columns


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6), min_size=1,
                max_size=4), st.integers(0, 9))
def test_a_column_is_its_weighted_sum_of_pooled_shares(got, seed):
    groups = {f"group {i}": Group(np.array(rows).T, np.full(len(rows), 4)) for i, rows in enumerate(got)}
    weights = {name: 1 / len(groups) for name in groups}
    column = score_columns(groups, {"overall": weights}, seed=seed)["overall"]
    expected = [sum(sum(row[s] for row in rows) / (4 * len(rows)) for rows in got) / len(got) for s in (0, 1)]
    np.testing.assert_allclose(column.mean, expected)
    assert (column.low <= column.mean + 1e-9).all() and (column.mean <= column.high + 1e-9).all()
    assert column.difference[0] == pytest.approx(expected[1] - expected[0])


def test_pooled_questions_are_not_a_mean_of_prompts():
    column = score_columns({"a": Group(np.array([[1, 0]]), np.array([1, 9]))}, {"a": {"a": 1.0}})["a"]
    assert column.mean[0] == pytest.approx(0.1)


def test_the_interval_is_that_of_the_binomial():
    """Of 400 verdicts of which 100 are right the standard error is known."""
    right = np.repeat([1.0, 0.0], [100, 300])
    column = score_columns({"a": Group(right[None], np.ones(400))}, {"a": {"a": 1.0}})["a"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose([column.low[0], column.high[0]], [0.25 - half, 0.25 + half], atol=0.005)


def test_a_difference_is_paired():
    """Two systems that differ on every prompt by the same amount: the difference has no spread."""
    one = np.random.default_rng(0).random(50)
    column = score_columns({"a": Group(np.stack([one, one + 0.1]), np.ones(50))}, {"a": {"a": 1.0}})["a"]
    np.testing.assert_allclose(column.difference, 0.1, atol=1e-12)
    assert column.high[0] - column.low[0] > 0.05


def test_one_prompt_has_no_interval():
    columns = score_columns({"a": Group(np.array([[0.5]]), np.ones(1))}, {"a": {"a": 1.0}})
    assert as_json(columns, ("turn1",)) == {"systems": {"turn1": {"a": {"mean": 0.5, "ci95": None}}}}


@pytest.mark.parametrize("group", [
    Group(np.zeros((1, 0)), np.zeros(0)), Group(np.array([[np.nan]]), np.ones(1)),
    Group(np.ones((1, 1)), np.zeros(1))])
def test_what_is_no_number_is_refused(group):
    with pytest.raises(ValueError, match="group 'a'"):
        score_columns({"a": group}, {"a": {"a": 1.0}})
