"""Costs of an IRGL-300K that nobody has: the data set was never released, so its lengths are assumed.

The assumption, chosen so that a text-to-image turn has about 4.4k tokens and an improving turn about
13.8k (4,098 clean + 4,902 ViT + 4,098 noised + text), as estimated for the paper's records:

- Texts are log-normal, in tokens with both brackets: prompt 60, question 30, first thinking 230,
  second thinking 400 on average. A system prompt, where the config has one, has a token for four
  characters.
- The first image of an improving record is the base model's, 1024 x 1024. Any other image is a
  target: four of five are 1024 x 1024, the rest 1536 x 1024 or 1024 x 1536, the sizes of GPT-4o.
- The six modes have the same number of records; how many they really have was not published.

Plans, fills and budgets from it say what to expect of such data, not of the real ones.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.images import target_size
from data_pipelines.samples import BRACKETS, Cost, Kind, image_rule

SIZES = ((1024, 1024), (1536, 1024), (1024, 1536))  # pixels, width and height
SHARES = (0.8, 0.1, 0.1)                            # of the targets
RECORDS = 50_000                                    # of each mode
CHARACTERS = 4                                      # of a system prompt in a token


class _Length(NamedTuple):
    """Tokens of a text: log-normal around `mean`, `sigma` the deviation of the logarithm."""

    mean: float
    sigma: float


PROMPT, QUESTION = _Length(60, 0.6), _Length(30, 0.3)
THINK1, THINK2 = _Length(230, 0.4), _Length(400, 0.35)
_OWN, _TARGET = "own", "target"  # images: of the base model, or of the data set
_BOTH = (Kind.CLEAN, Kind.VIT)

# What a record of each mode holds: texts, and images with the kinds in which they enter.
MODES = {
    "initial_thinking_understanding": (PROMPT, (_TARGET, _BOTH), QUESTION, THINK1),
    "initial_thinking_generation": (PROMPT, THINK1),
    "initial_full": (PROMPT, THINK1, (_TARGET, (Kind.NOISED,))),
    "improving_thinking_understanding": (PROMPT, (_OWN, _BOTH), (_TARGET, _BOTH), QUESTION, THINK2),
    "improving_thinking_generation": (PROMPT, THINK1, (_OWN, _BOTH), THINK2),
    "improving_full": (PROMPT, THINK1, (_OWN, _BOTH), THINK2, (_TARGET, (Kind.NOISED,))),
}


def simulate(config: DataConfig, *, records: int = RECORDS) -> dict[str, CostTable]:
    """The cost table of each group of `config`, by the group's name; a function of the seed.

    Raises: ValueError if a group is not one of the six modes (with or without `_learning`).
    """
    return {group.name: _simulate_group(config, group, records) for group in config.groups}


def _simulate_group(config: DataConfig, group: GroupConfig, records: int) -> CostTable:
    mode = group.name.removesuffix("_learning")
    if mode not in MODES:
        raise ValueError(f"group {group.name!r} is none of the simulated modes {sorted(MODES)}")
    rng = np.random.default_rng((config.seed, zlib.crc32(mode.encode())))
    target = rng.choice(len(SIZES), size=records, p=SHARES)
    columns = []
    for part in MODES[mode]:
        if isinstance(part, _Length):
            columns.append(_text(part, records, rng))
        else:
            size = target if part[0] == _TARGET else np.zeros(records, int)
            columns += [_image_costs(kind, config, group)[size] for kind in part[1]]
    items = np.stack(columns, axis=1).astype(np.int32)  # [records, items, 5]
    offsets = np.arange(records + 1, dtype=np.int64) * items.shape[1]
    tokens = -(-len(config.system_prompt_of(group)) // CHARACTERS) + BRACKETS
    return CostTable(items.reshape(-1, items.shape[2]), offsets).opened_by(tokens if tokens > BRACKETS else 0)


def _text(length: _Length, records: int, rng: np.random.Generator) -> np.ndarray:
    """int [records, 5]: kind and cost of a text."""
    location = np.log(length.mean) - length.sigma**2 / 2
    tokens = np.maximum(np.rint(rng.lognormal(location, length.sigma, records)), BRACKETS + 1)
    rows = np.zeros((records, 1 + len(Cost._fields)), np.int64)
    rows[:, 0], rows[:, 1] = Kind.TEXT, tokens
    return rows


def _image_costs(kind: Kind, config: DataConfig, group: GroupConfig) -> np.ndarray:
    """int [sizes, 5]: kind and cost of an image of each of `SIZES`."""
    transform, patch, _ = image_rule(kind, config, group)
    rows = []
    for size in SIZES:
        width, height = target_size(*size, transform)
        tokens, is_vit = (width // patch) * (height // patch), kind == Kind.VIT
        rows.append((kind, BRACKETS, tokens * is_vit, tokens * (not is_vit), int(not is_vit)))
    return np.array(rows)


def useful_tokens(used: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens of the three streams together, from costs [..., 4]."""
    return np.asarray(used)[..., :3].sum(axis=-1)
