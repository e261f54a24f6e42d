"""Where activations lie, and functions on each device's part of them: for a kernel, or a loop over packs, is no
program that a compiler would split well.

The models name the axes of what they pass; where these lie is this table, and without a mesh nothing changes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from irg_jax.parallel.sharding import BATCH_AXES, RULES

Axes = PartitionSpec    # of an array, by the names below

# Logical axis of an activation -> mesh axes.
PLACES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "packs": BATCH_AXES,
    "tokens": ("context",),
    "heads": ("tensor",),
}


def deal(tree: Any) -> Any:
    """Activations [B, S, ...] keep lying by packs and tokens, whatever axes the weights that they meet lie on.

    Without this a compiler may split features as weights are split, and hold all packs on every device. What
    the other dimensions do is free (`tensor`). Arrays without features are left alone.
    """
    if _is_single(jax.sharding.get_abstract_mesh()):
        return tree
    spec = lambda x: PartitionSpec(*_spec(Axes("packs", "tokens")),
                                   *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(x)) if x.ndim > 2 else x, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(x: Array, names: tuple[str | None, ...]) -> Array:
    """A parameter with logical axes `names`, gathered but for `tensor`; cast it first, for fewer bytes.

    Left to itself, a compiler may gather what meets it instead, all packs of it, or the parameter once more for
    each stream. Its gradient may lie anywhere.
    """
    if _is_single(jax.sharding.get_abstract_mesh()):
        return x
    spec = [PartitionSpec.UNCONSTRAINED if RULES[name] == ("tensor",) else None for name in names]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


whole.defvjp(lambda x, names: (whole(x, names), None), lambda names, _, d_x: (d_x,))


def per_shard(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`function` for whole arrays, run on each device's part of them under the mesh that is set.

    Args: trees of `Axes` that begin those of the arguments (a tuple) and of the result.
    """
    if _is_single(jax.sharding.get_abstract_mesh()):
        return function
    specs = lambda tree: jax.tree.map(_spec, tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    # What is gathered is equal on all devices; the check would want to be told so.
    mapped = functools.partial(jax.shard_map, in_specs=specs(in_axes), out_specs=specs(out_axes),
                               check_vma=False)

    def call(*arguments):
        return (mapped(function) if all(x.size for x in jax.tree.leaves(arguments)) else
                _keep_empty_out(function, mapped))(*arguments)
    return call


def _keep_empty_out(function: Callable, mapped: Callable) -> Callable:
    """`mapped` with arrays that hold nothing, an empty stream's, made on either side of it.

    The compiler of jaxlib 0.11.2 crashes where such arrays pass a shard_map (docs/log.md, 2026-11-28).
    """
    held = lambda tree: jax.tree.map(lambda x: x if x.size else None, tree)
    filled = lambda tree, shapes: jax.tree.map(
        lambda shape, x: jnp.zeros(shape.shape, shape.dtype) if x is None else x, shapes, tree)

    def call(*arguments):
        inner = []

        def look(*parts):
            inner.append(jax.tree.map(jax.typeof, parts))
            return function(*parts)
        outer = jax.eval_shape(mapped(look), *arguments)
        return filled(mapped(lambda *parts: held(function(*filled(parts, inner[0]))))(*held(arguments)), outer)
    return call


def share_out(function: Callable, rows: Any, name: str) -> Any:
    """Inside `per_shard`: `function` of a tree of arrays [N, ...], whose rows are dealt along a logical axis.

    Each device computes its share, the last perhaps once more than there is, and gets the results of all.
    """
    if not is_split(name):
        return function(rows)
    mesh, places = jax.sharding.get_abstract_mesh(), PLACES[name]
    ways, count = math.prod(mesh.shape[place] for place in places), len(jax.tree.leaves(rows)[0])
    first = jax.lax.axis_index(places) * -(-count // ways)
    own = jnp.minimum(first + jnp.arange(-(-count // ways)), count - 1)
    results = function(jax.tree.map(lambda x: x[own], rows))
    return jax.tree.map(lambda x: gather(x, 0, name)[:count], results)


def is_split(name: str) -> bool:
    """Whether a logical axis of activations lies on several devices of the mesh that is set."""
    return count_ways(name) > 1


def count_ways(name: str) -> int:
    """On how many devices of the mesh that is set a logical axis of activations lies."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if _is_single(mesh) else math.prod(mesh.shape[place] for place in PLACES[name])


def gather(x: Array, axis: int, name: str | None) -> Array:
    """Inside `per_shard`: the parts of all devices along a logical axis, one behind the other."""
    mesh = jax.sharding.get_abstract_mesh()
    places = () if _is_single(mesh) else tuple(place for place in PLACES[name] if mesh.shape[place] > 1)
    return jax.lax.all_gather(x, places, axis=axis, tiled=True) if places else x


def _spec(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(PLACES[name] or None for name in axes))


def _is_single(mesh: jax.sharding.AbstractMesh) -> bool:
    return mesh.empty or mesh.size == 1
