"""The training checkpoint: state and data position as one bundle, by Orbax.

STAGE/checkpoints/<step>/ holds the items `state` (step, params, opt), `ema` and `position`, and the digests
of their files (`seals`). A step counts once it is sealed: Orbax writes under a temporary name and renames,
then its files are read once more. Only then are steps before it dropped.
"""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from irg_jax.checkpoints.seals import SEAL, find_faults, seal, steps_of
from irg_jax.checkpoints.store import damage
from irg_jax.models.functional import Params
from irg_jax.models.groups import keep, paths_of, replace
from irg_jax.models.lora import LoraConfig, add_shapes, merge, read_lora

FOLDER = "checkpoints"
_PART_BYTES = 2**22


class SaveError(ValueError):
    """A checkpoint could not be written; those before it are as they were."""


class Bundles:
    """Checkpoints of one stage; saves in the background, keeps the `keep` newest sealed ones (None: all)."""

    def __init__(self, stage: pathlib.Path, *, keep: int | None):
        logging.getLogger("absl").addFilter(_is_news)
        self._folder, self._sealing = stage.absolute() / FOLDER, ThreadPoolExecutor(1)
        # No policy of Orbax drops steps: it would as soon as a newer one is written, and that is no step yet.
        self._checkpointer = ocp.training.Checkpointer(self._folder, cleanup_tmp_directories=True)
        self._seals: list[Future] = []
        self._keep = keep

    def latest(self) -> int | None:
        """The newest complete step."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, *, state: Any, ema: Params, position: dict[str, Any]) -> None:
        """Starts a save and returns; arrays are copied before it returns, so they may be donated after.

        `position` is JSON: the next data step, the data's fingerprint, and what else the run wants to know.
        Raises: SaveError if this save or an earlier one failed.
        """
        for sealed in self._seals[:-1]:    # saved faster than they are sealed, they would fill the disk
            sealed.result()
        self.check()
        if step == self.latest():
            return
        context = ocp.Context()
        # Copies of a small array are not written in parts: each part's slice is a program to compile.
        context.array.saving.min_slice_bytes_for_replica_parallel = _PART_BYTES
        # Orbax's own policy would drop a save that is asked for while another is under way.
        with context, _told(step):
            saved = self._checkpointer.save_checkpointables_async(
                step, {"state": state, "ema": ema, "position": position}, force=True)
        if jax.process_index() == 0:
            self._seals.append(self._sealing.submit(self._seal, step, saved))

    def _seal(self, step: int, saved: ocp.AsyncResponse[None]) -> None:
        with _told(step):
            saved.result()
        seal(self._folder / str(step))
        if self._keep:
            drop_before(self._folder, self._keep)

    def position(self, step: int) -> dict[str, Any]:
        """The small item of a step alone."""
        return self._checkpointer.load_checkpointables(step, {"position": None})["position"]

    def restore(self, step: int, *, state: Any, ema: Params) -> dict[str, Any]:
        """Both items of a step; `state` and `ema` are trees of ShapeDtypeStruct with shardings."""
        return self._checkpointer.load_checkpointables(step, {"state": state, "ema": ema})

    def check(self) -> None:
        """Raises: SaveError if a save failed, as soon as that is known."""
        done = [sealed for sealed in self._seals if sealed.done()]
        self._seals = [sealed for sealed in self._seals if sealed not in done]
        for sealed in done:
            sealed.result()

    def close(self) -> None:
        """Waits for saves under way. Raises: SaveError if one of them failed."""
        self._sealing.shutdown()
        with contextlib.ExitStack() as closing:
            closing.enter_context(_told(self.latest() or 0))
            closing.callback(self._checkpointer.close)
            for sealed in self._seals:
                sealed.result()


def _is_news(record: logging.LogRecord) -> bool:
    """False for the stacks that Orbax logs of an error it raises as well: `_told` tells it, and what a thread
    prints after that would hide the sentence."""
    return not (record.exc_info and "/orbax/checkpoint/" in pathlib.Path(record.pathname).as_posix())


@contextlib.contextmanager
def _told(step: int) -> Iterator[None]:
    """What Orbax and TensorStore raise for a disk that is full or gone, as one sentence."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise SaveError(f"a checkpoint, of step {step} or the one before, could not be written: {reason}. Make "
                        "room; the same command goes on from the newest that is sound") from error


def latest_step(stage: pathlib.Path) -> int:
    """The newest sealed step of a stage; 0 if there is none, and nothing is made.

    By names alone: Orbax would wait for other processes, which may see another folder.
    """
    folder = stage / FOLDER
    return next((step for step in steps_of(folder) if (folder / str(step) / SEAL).exists()), 0)


def is_exported(target: pathlib.Path, stage: pathlib.Path) -> bool:
    """Whether a folder holds something that is younger than the stage's newest sealed step."""
    newest = stage / FOLDER / str(latest_step(stage))
    return target.is_dir() and any(target.iterdir()) and target.stat().st_mtime > newest.stat().st_mtime


def drop_before(folder: pathlib.Path, count: int) -> None:
    """Removes what is older than the `count` newest sealed steps; what resists goes another time."""
    sealed = [step for step in steps_of(folder) if (folder / str(step) / SEAL).exists()]
    for step in steps_of(folder):
        if len(sealed) >= count and step < sealed[count - 1]:
            (folder / str(step) / SEAL).unlink(missing_ok=True)    # first: what is left of it is no step
            shutil.rmtree(folder / str(step), ignore_errors=True)


def check_sound(step: pathlib.Path, *items: str) -> None:
    """Reads items of a step. Raises: ValueError if they are not what was sealed."""
    if faults := find_faults(step, items):
        raise ValueError(f"{step} is damaged: {'; '.join(faults[:3])}; remove it, and the one before is taken")


def restore_ema(stage: pathlib.Path | str, shapes: Params, *,
                check: Callable[..., None] = check_sound) -> tuple[Params, int]:
    """EMA of a stage's newest bundle, and its step. What never trained is there once; adapters are merged.

    Args:
        shapes: the tree of ShapeDtypeStruct that the parameters must have; what has no sharding goes to the
            host's own processor.
        check: takes a step's folder and names of items, and raises if they are not sound.
    Raises: ValueError if the stage has no complete checkpoint, or the newest is not what was written.
    """
    folder = pathlib.Path(stage).absolute() / FOLDER
    if not folder.is_dir():
        raise ValueError(f"{stage} has no {FOLDER} folder; train the stage first")
    while step := latest_step(pathlib.Path(stage)):
        try:
            return _restore_ema(folder / str(step), shapes, check), step
        except ValueError:
            if (folder / str(step) / SEAL).exists():
                raise
            # else a training has dropped it meanwhile, for a newer one
    raise ValueError(f"{folder} holds no complete checkpoint yet")


def _restore_ema(step: pathlib.Path, shapes: Params, check: Callable[..., None]) -> Params:
    """Of one step; no more than what is read is compared with its seal, for a whole bundle takes minutes."""
    check(step, "ema", "position")
    device = jax.sharding.SingleDeviceSharding(_own_processor())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), shapes)
    with damage(step):
        position = ocp.load_checkpointables(step, {"position": None})["position"]
        lora = read_lora(position["lora"]) if "lora" in position else LoraConfig()
        lacks = position.get("not_averaged", [])
    whole = add_shapes(abstract, lora)
    rest = keep(whole, [path in lacks for path in paths_of(whole)])
    wanted = {"ema": keep(whole, [path not in lacks for path in paths_of(whole)])}
    if rest:
        check(step, "state")
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(rest)    # else what nobody asked for is a fault
    with damage(step), context:
        found = ocp.load_checkpointables(step, wanted | ({"state": {"params": rest}} if rest else {}))
    params = replace(found["state"]["params"], found["ema"]) if rest else found["ema"]
    return jax.jit(merge, static_argnums=1)(params, lora) if lora.groups else params


def _own_processor() -> jax.Device:
    """The host's, where JAX has it beside an accelerator, which may be too small for a whole model."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:    # JAX_PLATFORMS leaves it out
        return jax.local_devices()[0]
