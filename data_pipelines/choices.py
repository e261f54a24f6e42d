"""Which items of a record make a sample: all of a conversation, one caption of several, a chain of edits.

A sample is drawn anew in every epoch from the row of uniform numbers that its record is given, and from
nothing else: the planner, which sees only cost tables, and the reader, which sees the record, choose the
same items, so a planned cost is exact. A sample keeps the order of its record, so a choice is a mask.

    text_to_image   TEXT+ NOISED                   one of the captions, then the image
    editing         CLEAN VIT                      image 0, where a chain may start
                    (TEXT+ NOISED CLEAN VIT)*      instructions, one of which leads to the image of the step
                    TEXT+ NOISED                   the last image, where no chain starts

A system prompt before them enters always.
"""

import numpy as np

from data_pipelines.records import Kind


def choose(kind: str, kinds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The items of one sample, in order, as indices into the record's candidates.

    Args:
        kind: of the group, see `GroupConfig.kind`.
        kinds: int [candidates], their `Kind` codes in the record's order.
        uniform: float [candidates] in [0, 1), all the randomness there is.
    """
    return np.flatnonzero(choose_many(kind, kinds, np.array([0, len(kinds)]), uniform))


def choose_many(kind: str, kinds: np.ndarray, offsets: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The items of many samples: bool [M], true where a candidate enters.

    Args:
        kinds: int [M], the candidates of R records one after the other.
        offsets: int [R + 1]; record i has those from offsets[i] to offsets[i + 1], perhaps none.
        uniform: float [M] in [0, 1).
    """
    enters = np.ones(len(kinds), bool)
    if kind not in ("text_to_image", "editing"):
        return enters
    is_own = kinds != Kind.SYSTEM
    kinds, uniform = kinds[is_own], uniform[is_own]
    enters[is_own] = _one_of_each_run(kinds, uniform)
    if kind == "editing":
        enters[is_own] &= _chains(kinds, np.concatenate([[0], np.cumsum(is_own)])[offsets], uniform)
    return enters


def largest(kind: str, items: np.ndarray) -> np.ndarray:
    """What the largest samples of one record cost before dropout.

    Args: items int [candidates, 5], as `samples.measure` gives them.
    Returns: int64 [n, 4], costs of samples. Whatever is chosen costs, in all four fields, no more than one
        of these.
    """
    if not len(items) or kind not in ("text_to_image", "editing"):
        return items[:, 1:].sum(axis=0, dtype=np.int64, keepdims=True)
    is_own = items[:, 0] != Kind.SYSTEM
    system, costs = items[~is_own, 1:].sum(axis=0, dtype=np.int64), _with_longest_text(items[is_own])
    if kind == "text_to_image":
        return costs.sum(axis=0, keepdims=True) + system
    images = np.pad(costs, ((2, 2), (0, 0))).reshape(-1, 4, costs.shape[1])  # TEXT, NOISED, CLEAN, VIT of each
    arrive, leave = images[:, :2].sum(axis=1), images[:, 2:].sum(axis=1)
    edits = leave[:-1] + arrive[1:]
    edits[:-1] += edits[1:]  # two in a row, but for the last
    return edits + system


def _one_of_each_run(kinds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """bool [M]: one text of each run of texts, and all that is no text."""
    is_text = np.concatenate([[False], kinds == Kind.TEXT, [False]])
    first, end = np.flatnonzero(np.diff(is_text)).reshape(-1, 2).T
    chosen = kinds != Kind.TEXT
    # A number below 1 times a count is below the count, in floating point too.
    chosen[first + (uniform[first] * (end - first)).astype(np.int64)] = True
    return chosen


def _chains(kinds: np.ndarray, offsets: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """bool [M]: what lies on a record's chain of one or two edits, all alternatives of its texts included.

    Any image but the last is the first of a chain, one of the next two (or the next) its last, each as likely.
    Half of the chains of two go there at once, without the image between, except that those to the record's
    last image stop at the image between.

    Source: `parse_row` of BAGEL's data/interleave_datasets/edit_dataset.py. There a chain that goes at once
        joins its instructions to one text; here each keeps its own block, so that costs add up.
    """
    is_text = kinds == Kind.TEXT
    starts_step = is_text & ~np.concatenate([[False], is_text[:-1]])
    used = np.flatnonzero(np.diff(offsets))  # records that have candidates
    begin, last = offsets[used], offsets[used + 1] - 1
    lengths = last + 1 - begin
    step = np.cumsum(starts_step)
    step -= np.repeat(step[begin], lengths)  # a record begins with an image, so this is its step 0
    num_edits = step[last]
    # The numbers of the first image's two items and of the last item: no text draws with those.
    start = (uniform[begin] * num_edits).astype(np.int64)
    length = 1 + (uniform[begin + 1] * np.minimum(num_edits - start, 2)).astype(np.int64)
    at_once = (length == 2) & (uniform[last] < 0.5)
    length -= at_once & (start + length == num_edits)
    start, length, at_once = (np.repeat(each, lengths) for each in (start, length, at_once))
    position = step - start
    is_between = (position > 0) & (position < length) & ~at_once
    is_condition = (kinds == Kind.CLEAN) | (kinds == Kind.VIT)
    return np.where(is_text, (position > 0) & (position <= length),
                    is_between | (position == np.where(is_condition, 0, length)))


def _with_longest_text(items: np.ndarray) -> np.ndarray:
    """The costs, int64 [n, 4], with the longest alone of each run of texts."""
    is_text = items[:, 0] == Kind.TEXT
    runs = np.split(np.arange(len(items)), np.flatnonzero(np.diff(is_text)) + 1)
    kept = [run[[np.argmax(items[run, 1])]] if is_text[run[0]] else run for run in runs]
    return items[np.concatenate(kept), 1:].astype(np.int64)
