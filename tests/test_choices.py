"""What enters a sample: every legal choice, as often as it should, the same for one record and for many."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.choices import choose, choose_many, largest
from data_pipelines.records import Kind

ALTERNATIVES = st.lists(st.integers(1, 3), min_size=1, max_size=4)  # of each text or edit


def layout(kind: str, alternatives: list[int]) -> list[tuple]:
    """The candidates of a record as (Kind, step, alternative); step is the image a text leads to."""
    texts = lambda step, count: [(Kind.TEXT, step, i) for i in range(count)]
    if kind == "text_to_image":
        return [*texts(0, alternatives[0]), (Kind.NOISED, 0, 0)]
    if kind == "editing":
        items = [(Kind.CLEAN, 0, 0), (Kind.VIT, 0, 0)]
        for step, count in enumerate(alternatives, 1):
            items += [*texts(step, count), (Kind.NOISED, step, 0), (Kind.CLEAN, step, 0), (Kind.VIT, step, 0)]
        return items[:-2]
    return [(Kind(i % 4), i, 0) for i in range(sum(alternatives))]


def truth(kind: str, alternatives: list[int]) -> dict[tuple, float]:
    """The probability of every sample, told as the original tells it: draw by draw."""
    if kind == "text_to_image":
        return {((Kind.TEXT, 0, i), (Kind.NOISED, 0, 0)): 1 / alternatives[0] for i in range(alternatives[0])}
    if kind != "editing":
        return {tuple(layout(kind, alternatives)): 1.0}
    chances = collections.Counter()
    num_images = len(alternatives) + 1
    for start in range(num_images - 1):
        ends = range(start + 1, min(start + 3, num_images))
        for end, joined in itertools.product(ends, (False, True)):
            chance = 1 / (num_images - 1) / len(ends) / 2
            if end - start == 1:
                joined = False  # nothing to join
            elif joined and end == num_images - 1:
                end -= 1
            steps = range(start + 1, end + 1)
            for picked in itertools.product(*(range(alternatives[step - 1]) for step in steps)):
                sample = [(Kind.CLEAN, start, 0), (Kind.VIT, start, 0)]
                for step, i in zip(steps, picked):
                    sample.append((Kind.TEXT, step, i))
                    if step == end:
                        sample.append((Kind.NOISED, step, 0))
                    elif not joined:
                        sample += [(kind, step, 0) for kind in (Kind.NOISED, Kind.CLEAN, Kind.VIT)]
                chances[tuple(sample)] += chance / np.prod([alternatives[step - 1] for step in steps])
    return dict(chances)


KINDS = st.sampled_from(["conversation", "vision_language", "text_to_image", "editing"])


@pytest.mark.parametrize("kind, alternatives", [
    ("conversation", [3]), ("vision_language", [3]), ("text_to_image", [1]), ("text_to_image", [4]),
    ("editing", [1]), ("editing", [3]), ("editing", [1, 2]), ("editing", [2, 1, 2]),
    ("editing", [1, 2, 1, 1, 2])])
def test_every_legal_sample_as_often_as_in_the_original(kind, alternatives):
    items, expected, count = layout(kind, alternatives), truth(kind, alternatives), 20_000
    assert sum(expected.values()) == pytest.approx(1)
    uniform = np.random.default_rng(0).random((count, len(items)))
    kinds = np.array([item[0] for item in items])
    mask = choose_many(kind, np.tile(kinds, count), np.arange(count + 1) * len(items), uniform.ravel())
    seen = collections.Counter(tuple(items[i] for i in np.flatnonzero(row)) for row in mask.reshape(count, -1))
    assert seen.keys() == expected.keys()
    for sample, chance in expected.items():
        deviation = np.sqrt(count * chance * (1 - chance))
        assert abs(seen[sample] - count * chance) <= 5 * deviation, sample


@settings(max_examples=200, deadline=None)
@given(kind=KINDS, records=st.lists(st.just([]) | ALTERNATIVES, max_size=6), seed=st.integers(0, 2**32))
def test_many_records_are_chosen_as_each_alone(kind, records, seed):
    """Records without candidates, which are the bad ones of a cost table, disturb nobody."""
    kinds = [np.array([item[0] for item in layout(kind, each)] if each else [], np.int32) for each in records]
    offsets = np.cumsum([0, *map(len, kinds)])
    # The ends of [0, 1) are where a rounded product would leave its range.
    uniform = np.random.default_rng(seed).choice([0.0, 0.3, 0.5, 0.7, np.nextafter(1, 0)], offsets[-1])
    mask = choose_many(kind, np.concatenate([np.zeros(0, np.int32), *kinds]), offsets, uniform)
    assert mask.dtype == bool and mask.shape == (offsets[-1],)
    for i, (alternatives, record) in enumerate(zip(records, kinds)):
        rows = slice(offsets[i], offsets[i + 1])
        alone = choose(kind, record, uniform[rows])
        np.testing.assert_array_equal(alone, np.flatnonzero(mask[rows]))
        if alternatives:
            items = layout(kind, alternatives)
            assert tuple(items[j] for j in alone) in truth(kind, alternatives)


@settings(max_examples=200, deadline=None)
@given(kind=KINDS, alternatives=ALTERNATIVES, seed=st.integers(0, 2**32))
def test_the_largest_samples_bound_every_sample_and_are_samples(kind, alternatives, seed):
    items = layout(kind, alternatives)
    cost = np.random.default_rng(seed).integers(1, 100, (len(items), 4), np.int32)
    is_text = np.array([item[0] == Kind.TEXT for item in items])
    cost[is_text, 1:] = 0
    table = np.concatenate([np.array([[item[0]] for item in items]), cost], axis=1)
    samples = [cost[[items.index(item) for item in sample]].sum(axis=0) for sample in truth(kind, alternatives)]
    bounds = largest(kind, table)
    for sample in samples:
        assert (sample <= bounds).all(axis=1).any()
    for bound in bounds:
        assert bound.tolist() in [sample.tolist() for sample in samples]


@pytest.mark.parametrize("kind", ["conversation", "text_to_image", "editing"])
def test_the_largest_sample_of_nothing_costs_nothing(kind):
    assert largest(kind, np.zeros((0, 5), np.int32)).tolist() == [[0, 0, 0, 0]]
