"""The training checkpoint: state and data position as one bundle, by Orbax.

STAGE/checkpoints/<step>/ holds the items `state` (step, params, opt), `ema` and `position`. A step is
visible only when it is complete: Orbax writes under a temporary name and renames.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from irg_jax.models.functional import Params

FOLDER = "checkpoints"
_PART_BYTES = 2**22
_COMPLETE = "commit_success.txt"   # Orbax's last file


class Bundles:
    """Checkpoints of one stage; saves in the background, keeps the latest `keep` (None: all)."""

    def __init__(self, stage: pathlib.Path, *, keep: int | None):
        self._checkpointer = ocp.training.Checkpointer(
            stage.absolute() / FOLDER, cleanup_tmp_directories=True,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep) if keep else None)

    def latest(self) -> int | None:
        """The newest complete step."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, *, state: Any, ema: Params, position: dict[str, Any]) -> None:
        """Starts a save and returns; arrays are copied before it returns, so they may be donated after.

        `position` is JSON: the next data step and the data's fingerprint.
        """
        if step == self.latest():
            return
        context = ocp.Context()
        # Copies of a small array are not written in parts: each part's slice is a program to compile.
        context.array.saving.min_slice_bytes_for_replica_parallel = _PART_BYTES
        # Orbax's own policy would drop a save that is asked for while another is under way.
        with context:
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "ema": ema, "position": position}, force=True)

    def restore(self, step: int, *, state: Any, ema: Params) -> dict[str, Any]:
        """Items of a step; `state` and `ema` are trees of ShapeDtypeStruct with shardings."""
        return self._checkpointer.load_checkpointables(
            step, {"state": state, "ema": ema, "position": None})

    def close(self) -> None:
        """Waits for saves under way."""
        self._checkpointer.close()


def latest_step(stage: pathlib.Path) -> int:
    """The newest complete step of a stage; 0 if there is none, and nothing is made.

    By names alone: Orbax would wait for other processes, which may see another folder.
    """
    found = (stage / FOLDER).glob(f"*/{_COMPLETE}")
    return max((int(path.parent.name) for path in found if path.parent.name.isdecimal()), default=0)


def restore_ema(stage: pathlib.Path | str, shapes: Params) -> tuple[Params, int]:
    """EMA of a stage's newest bundle, and its step.

    Args: shapes is the tree of ShapeDtypeStruct that the parameters must have; what has no sharding goes to
        the first device.
    Raises: ValueError if the stage has no complete checkpoint.
    """
    folder = pathlib.Path(stage).absolute() / FOLDER
    if not folder.is_dir():
        raise ValueError(f"{stage} has no {FOLDER} folder; train the stage first")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), shapes)
    with ocp.training.Checkpointer(folder) as checkpointer:
        if checkpointer.latest is None:
            raise ValueError(f"{folder} holds no complete checkpoint yet")
        step = checkpointer.latest.step
        return checkpointer.load_checkpointables(step, {"ema": abstract})["ema"], step
