"""Which items of a record make a sample: all of a conversation, one caption of several, a chain of edits."""

import numpy as np


def choose(kind: str, kinds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The items of one sample, in order, as indices into the record's candidates.

    Args:
        kind: of the group, see `GroupConfig.kind`.
        kinds: int [candidates], their `samples.Kind` codes in the record's order.
        uniform: float [candidates] in [0, 1), all the randomness there is.
    """
    return np.arange(len(kinds))
