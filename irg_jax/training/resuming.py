"""A run goes on with the config that it was begun with, or is told by name what has changed."""

import dataclasses
import json
import pathlib
from collections.abc import Collection
from typing import Any

from data_pipelines.digests import write_json
from data_pipelines.fingerprints import compare, flatten
from irg_jax.checkpoints.model import read_json
from irg_jax.config import TrainConfig

CONFIG = "config.json"
# These change no step but by rounding, or nothing at all. What data give is compared by `check_position`.
FREE = ("data", "mesh", "on_host", "topologies", "accumulate", "remat", "save_every", "keep", "log_every",
        "max_skipped", "hang_seconds", "peak_tflops", "profile_at", "profile_steps", "draw_every", "samples",
        "export", "wandb")
FIXED = ("optimizer.moments", "lora.")    # what the names of such fields begin with


def write_config(folder: pathlib.Path, config: TrainConfig) -> None:
    write_json(folder / CONFIG, dataclasses.asdict(config))


def check_changes(folder: pathlib.Path, config: TrainConfig, step: int, accepted: Collection[str]) -> list[str]:
    """What has changed since the run was begun and is accepted, a sentence each.

    Args: accepted are the dotted names of fields that may change.
    Raises: ValueError naming those that changed and are not accepted, or accepted ones that are none.
    """
    try:
        old = _compared(read_json(folder / CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config that the run was begun with cannot be read: {error}") from error
    new = _compared(json.loads(json.dumps(dataclasses.asdict(config))))
    if unknown := [name for name in accepted if name not in old and name not in new]:
        raise ValueError(f"--accept_changes names {', '.join(unknown)}, and these are compared: "
                         f"{', '.join(sorted(new))}")
    changed = {difference.partition(":")[0]: difference for difference in compare(old, new)}
    # Of a run that was begun before a field was known, the field may be accepted.
    if fixed := [told for name, told in changed.items() if name.startswith(FIXED) and name in old]:
        raise ValueError(f"{folder} was begun with another config: {'; '.join(fixed)}, which cannot "
                         "change within a run: its checkpoints hold moments and adapters. Undo that, or begin "
                         "anew from its EMA")
    if refused := [name for name in changed if name not in accepted]:
        told = "; ".join(changed[name] for name in refused)
        raise ValueError(f"{folder} was begun with another config: {told}. Undo that, use another --workdir, "
                         f"or go on from step {step} with --accept_changes={','.join(refused)}")
    return [f"from step {step} on {difference}" for difference in changed.values()]


def _compared(config: Any) -> dict[str, Any]:
    return {name: value for name, value in flatten(config).items() if name.split(".")[0] not in FREE}
