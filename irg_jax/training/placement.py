"""Where everything that a training step touches lies on a mesh."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.batch import PackedBatch, Rows
from irg_jax.config import TrainConfig
from irg_jax.kernels.attention import TILE
from irg_jax.models.functional import Functional
from irg_jax.parallel.sharding import BATCH_AXES, param_shardings, replicated
from irg_jax.training.optimizer import drop
from irg_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of everything the step touches."""

    state: TrainState
    vae: Any
    batch: Any
    scalar: Any


def place(model: Functional, vae: Functional, optimizer, mesh, never: Collection[str] = ()) -> Placement:
    """Parameters, moments and EMA, which lacks what never trains, share one layout; counters are replicated."""
    params = param_shardings(model.axes, model.shapes, mesh)
    scalar = replicated(mesh)
    opt = shard_moments(jax.eval_shape(optimizer.init, model.shapes), params, scalar)
    return Placement(TrainState(scalar, params, opt, drop(params, never)),
                     param_shardings(vae.axes, vae.shapes, mesh), place_batch(mesh), scalar)


def place_batch(mesh: jax.sharding.Mesh) -> PackedBatch:
    """Packs are dealt over the batch axes and the tokens of each stream over `context`; tables are whole."""
    spec = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    packs, tokens = spec(BATCH_AXES), spec(BATCH_AXES, "context")
    of = lambda name: (packs if name.startswith("image_") else
                       Rows(*[tokens] * len(Rows._fields)) if name.endswith("_rows") else tokens)
    return PackedBatch(*map(of, PackedBatch._fields))


def check_share(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if packs cannot be dealt evenly over the batch axes, or tokens over `context`."""
    packs, ways = config.data.packs_per_step // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if packs % ways:
        raise ValueError(f"data.packs_per_step / accumulate is {packs}; it must be a multiple of mesh.data * "
                         f"mesh.fsdp = {ways}. Change either, or move devices to mesh.context or mesh.tensor")
    for name in ("text_tokens", "vit_tokens", "latent_tokens"):
        size, ways = getattr(config.data, name), mesh.shape["context"]
        if size % ways:
            raise ValueError(f"data.{name} is {size}; it must be a multiple of mesh.context = {ways}. Change "
                             f"either; multiples of {TILE} x mesh.context waste no tile of attention")


def shard_moments(opt: optax.OptState, params: Any, scalar: Any) -> Any:
    """Every leaf of an optimiser state that stands at a parameter's path lies as that parameter does.

    By path, since `optax.tree_map_params` cannot see through the masks that frozen parameters leave.
    """
    keys = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    table = {keys(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}
    def find(path, leaf):
        names = keys(path)   # an optimiser may put keys of its own before a parameter's
        place = next((table[names[i:]] for i in range(len(names)) if names[i:] in table), scalar)
        # What is kept once for a whole axis is not split over it.
        spec = (None if size == 1 else axes for size, axes in zip(leaf.shape, place.spec))
        return NamedSharding(place.mesh, PartitionSpec(*spec))
    return jax.tree_util.tree_map_with_path(find, opt)


def rows_here(packs: NamedSharding, count: int) -> list[int]:
    """The packs of a step, of `count`, that this process's devices hold; others may hold them too."""
    held = packs.addressable_devices_indices_map((count,)).values()
    return sorted({row for (part,) in held for row in range(count)[part]})
