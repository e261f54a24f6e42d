"""Visibility as integers against dense masks: the golden ones, and ones built from splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_cases import Golden, golden_folder
from data_pipelines.batch import INF, Rows, padding_rows, visible

MODES = ("causal", "full", "noise")


@pytest.fixture(scope="module")
def golden(request):
    return Golden(golden_folder(request))


def dense_mask(split_lens, attn_modes) -> np.ndarray:
    """bool [S, S] inside one sample, written from the rule: causal or full blocks see the past,
    noised blocks see it too but are seen by themselves alone."""
    size = sum(split_lens)
    mask = np.zeros((size, size), bool)
    start = 0
    for length, mode in zip(split_lens, attn_modes):
        end = start + length
        mask[start:end, :start] = True
        mask[start:end, start:end] = np.tri(length, dtype=bool) if mode == "causal" else True
        start = end
    start = 0
    for length, mode in zip(split_lens, attn_modes):
        if mode == "noise":
            mask[:start, start:start + length] = False
            mask[start + length:, start:start + length] = False
        start += length
    return mask


def rows_of(samples, *, padding: int = 0) -> Rows:
    """The rows of samples given as (split_lens, attn_modes), token by token."""
    tokens, order = [], 0
    for split_lens, attn_modes in samples:
        first = order
        for length, mode in zip(split_lens, attn_modes):
            for i in range(length):
                own, block = order + i, (order, order + length - 1)
                span, last = (own, own) if mode == "causal" else block
                tokens.append((own, first, span, last, mode == "noise", 0))
            order += length
    rows = padding_rows((len(tokens) + padding,))
    for i, token in enumerate(tokens):
        for row, value in zip(rows, token):
            row[i] = value
    return rows


def test_golden_masks(golden):
    for i, case in enumerate(golden.values["masks"]):
        expected = golden.arrays[f"mask.{i}"].astype(bool)
        lens, modes = case["split_lens"], case["attn_modes"]
        np.testing.assert_array_equal(dense_mask(lens, modes), expected)
        rows = rows_of([(lens, modes)])
        np.testing.assert_array_equal(visible(rows, rows), expected)


SPLITS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(MODES)), min_size=1, max_size=5)


@given(st.lists(SPLITS, min_size=1, max_size=4), st.integers(0, 3), st.randoms())
def test_visible_is_the_dense_mask(samples, padding, random):
    """Any samples, any padding, tokens stored in any order."""
    samples = [tuple(zip(*splits)) for splits in samples]
    blocks = [dense_mask(*sample) for sample in samples]
    size = sum(len(block) for block in blocks) + padding
    expected, start = np.zeros((size, size), bool), 0
    for block in blocks:
        expected[start:start + len(block), start:start + len(block)] = block
        start += len(block)
    layout = list(range(size))
    random.shuffle(layout)
    rows = Rows(*(row[layout] for row in rows_of(samples, padding=padding)))
    np.testing.assert_array_equal(visible(rows, rows), expected[np.ix_(layout, layout)])


def test_padding_sees_nothing_and_is_unseen():
    rows = padding_rows((3, 5))
    assert not visible(rows, rows).any()
    text = rows_of([((4,), ("causal",))])
    assert not visible(padding_rows((2,)), text).any()
    assert not visible(text, padding_rows((2,))).any()
    assert (rows.order == INF).all() and rows.noised.dtype == bool
