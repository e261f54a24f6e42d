"""The costs that a built data set brings along, so that training need not read the images' headers.

    costs.npz   items int32 [M, 5], offsets int64 [R + 1]: a `CostTable`; key: what they depend on, JSON
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.tokenizer import Tokenizer

COSTS = "costs.npz"
ITEM = 5  # numbers of an item: its kind, and the four fields of `Cost`
_FIELDS = ("latent_patch", "vit_patch", "max_latent_size", "vit_max_side", "max_text_chars",
           "max_image_bytes", "max_image_pixels")


def describe_costs(config: DataConfig, group: GroupConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the costs of a record depend on: transforms, tokenizer, limits. Budgets are not among it."""
    return {"vae_transform": dataclasses.asdict(group.vae_transform or config.vae_transform),
            "vit_transform": dataclasses.asdict(group.vit_transform or config.vit_transform),
            "kind": group.kind, "tokenizer": tokenizer.fingerprint,
            **{name: getattr(config, name) for name in _FIELDS}}


def save_costs(folder: pathlib.Path, items: np.ndarray, offsets: np.ndarray, key: Mapping[str, Any]) -> None:
    """Writes costs.npz; the same costs give the same bytes."""
    np.savez(folder / COSTS, items=items, offsets=offsets, key=np.array(json.dumps(key, sort_keys=True)))


def load_costs(folder: pathlib.Path, key: Mapping[str, Any], *,
               length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(items, offsets) of `length` records; None if there are none, or they were measured otherwise.

    Args: key is `describe_costs` of the configuration at hand.
    Raises: ValueError if the file is damaged.
    """
    path = folder / COSTS
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            items, offsets, written = file["items"], file["offsets"], json.loads(str(file["key"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the costs are damaged ({error}); build the data set again") from error
    if written != dict(key):
        return None
    if len(offsets) != length + 1 or items.shape != (int(offsets[-1]), ITEM):
        raise ValueError(f"{path}: costs of {len(offsets) - 1} records, not of {length}; build the data "
                         "set again")
    return items, offsets
