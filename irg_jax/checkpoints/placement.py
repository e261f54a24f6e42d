"""A checkpoint straight onto the devices of a mesh: a host holds a few leaves of the network, never all."""

import collections
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from irg_jax.checkpoints import names
from irg_jax.checkpoints.bundle import FOLDER as BUNDLES
from irg_jax.checkpoints.bundle import check_sound, restore_ema
from irg_jax.checkpoints.model import Model, join_leaves, load_stage_frozen, model_slots, open_model
from irg_jax.checkpoints.store import Reader
from irg_jax.models.functional import Params


def load_frozen(path: str | pathlib.Path) -> Model:
    """All of a model checkpoint, or of a stage folder, but the network: `params` is empty.

    Raises: as `load_model`, for what it reads.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / BUNDLES).is_dir():
        return load_stage_frozen(folder)
    config, tokenizer, reader = open_model(folder)
    parts = {"vae": model_slots(config)["vae"]}
    (vae,) = join_leaves(reader.read([f"vae.{slot.leaf}" for slot in parts["vae"]]), parts)
    return Model(config, tokenizer, {}, vae)


def load_onto(path: str | pathlib.Path, shapes: Params, *, check: Callable[..., None] = check_sound) -> Params:
    """The network, every parameter placed as soon as it is read.

    Args:
        shapes: a tree of ShapeDtypeStruct with NamedShardings, as parameters will lie; layers are never split.
        check: of a stage folder, as `restore_ema` takes it.
    Raises: as `load_model`.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / BUNDLES).is_dir():
        return restore_ema(folder, shapes, check=check)[0]
    config, _, reader = open_model(folder)
    return names.unflatten(dict(_place(reader, model_slots(config)["model"], names.flatten(shapes))))


def _place(reader: Reader, slots: list[names.Slot], shapes: dict[str, jax.ShapeDtypeStruct]
           ) -> Iterator[tuple[str, jax.Array]]:
    groups = collections.defaultdict(list)
    for slot in slots:
        groups[slot.path].append(slot)
    leaves = reader.in_turn([f"model.{slot.leaf}" for group in groups.values() for slot in group])
    for path, group in groups.items():
        whole, dtype = shapes[path].sharding, shapes[path].dtype
        if group[0].layer is None:
            yield path, put(next(leaves), whole, dtype)
            continue
        assert [slot.layer for slot in group] == list(range(len(group)))
        layer = NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:]))
        parts = [put(next(leaves), layer, dtype) for _ in group]
        yield path, jax.jit(lambda *parts: jnp.stack(parts), out_shardings=whole)(*parts)


def put(leaf: np.ndarray, sharding: NamedSharding, dtype: DTypeLike = np.float32) -> jax.Array:
    """A leaf that every host has; `jax.device_put` would compare it over the network first."""
    leaf = np.asarray(leaf, dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
