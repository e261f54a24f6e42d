"""Where everything that a training step touches lies on a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from data_pipelines.batch import PackedBatch, Rows
from irg_jax.config import TrainConfig
from irg_jax.kernels.attention import TILE
from irg_jax.models.functional import Functional, Params
from irg_jax.parallel.sharding import BATCH_AXES, HOST, param_shardings, replicated
from irg_jax.training.optimizer import drop
from irg_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of everything the step touches."""

    state: TrainState
    vae: Any
    batch: Any
    scalar: Any


def place(model: Functional, vae: Functional, optimizer: optax.GradientTransformation,
          mesh: Mesh | AbstractMesh, never: Collection[str] = (), on_host: Collection[str] = ()) -> Placement:
    """Parameters, moments and EMA, which lacks what never trains, share one layout; counters are replicated.

    Args: on_host names what lies in the host's memory, by the device that it is the share of.
    """
    params = param_shardings(model.axes, model.shapes, mesh)
    scalar = replicated(mesh)
    shapes = jax.eval_shape(optimizer.init, model.shapes)
    opt, ema = shard_moments(shapes, params, scalar), drop(params, never)
    if "moments" in on_host:
        opt = jax.tree.map(lambda x, where: where.with_memory_kind(HOST) if x.ndim else where, shapes, opt)
    if "ema" in on_host:
        ema = jax.tree.map(lambda where: where.with_memory_kind(HOST), ema)
    return Placement(TrainState(scalar, params, opt, ema), param_shardings(vae.axes, vae.shapes, mesh),
                     place_batch(mesh), scalar)


def bring_home(params: Params, shardings: Any, dtype: DTypeLike, *, stays: bool) -> Params:
    """Parameters of all hosts onto devices of this one, leaf by leaf; {} unless `stays`.

    All hosts call it together. Where there are several, each device holds a whole leaf for a moment.
    """
    def move(leaf: jax.Array, there: NamedSharding) -> jax.Array | None:
        # From the host's memory first: at once with a change of devices JAX mistakes where a buffer lies.
        leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
        if jax.process_count() == 1:
            return jax.device_put(leaf.astype(dtype), there)
        whole = _gatherer(jnp.dtype(dtype), replicated(leaf.sharding.mesh))(leaf)
        whole.block_until_ready()    # one at a time: they are large, and CPUs' collectives starve each other
        return jax.device_put(whole.addressable_data(0), there) if stays else None
    home = jax.tree.map(move, params, shardings)
    return home if stays else {}


@functools.cache
def _gatherer(dtype: jnp.dtype, there: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda leaf: leaf.astype(dtype), out_shardings=there)


def check_host_memory(on_host: Collection[str]) -> None:
    """Raises ValueError if something is to lie in the host's memory and this machine's devices reach none."""
    device = jax.local_devices()[0]
    if on_host and HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise ValueError(f"on_host is {tuple(on_host)}; {device.device_kind} has no memory {HOST!r} but "
                         f"{', '.join(kinds)}. Leave on_host out")


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

    By path: what does not train has no leaf there, and a moment may be several (`compact.Roots`).
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
