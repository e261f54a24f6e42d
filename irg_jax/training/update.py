"""The end of a step: the optimiser, then the average. A step that is not finite changes neither.

What lies in the host's memory (`TrainConfig.on_host`) comes to the device one layer of one parameter at a time
and goes back, so that the device holds a layer of it and never the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import paths_of, pick, replace
from irg_jax.training.optimizer import OptimizerConfig, average, clip_factor, drop, select
from irg_jax.training.state import TrainState


class Trained(NamedTuple):
    """What changes of the parameters that train: of all of them, of one, or of a layer of one."""

    params: Params
    opt: optax.OptState
    ema: Params


Change = Callable[[Params, Trained], tuple[Trained, Float[Array, "2"]]]


def make_update(model: Functional, config: OptimizerConfig, optimizer: optax.GradientTransformation
                ) -> Callable:
    """Builds `update(state, grads, norm, finite)` -> (new state, ratio).

    `norm` is that of `grads`, for clipping; the ratio that of the update to what it changes.
    """
    is_stacked = {path: axes[0] == "layers" for path, axes in zip(
        paths_of(model.shapes), jax.tree.structure(model.shapes).flatten_up_to(model.axes), strict=True)}

    def update(state: TrainState, grads: Params, norm: Float[Array, ""], finite: Bool[Array, ""]
               ) -> tuple[TrainState, jax.Array]:
        factor = clip_factor(config, norm)

        def change(grads: Params, old: Trained) -> tuple[Trained, Float[Array, "2"]]:
            grads = jax.tree.map(lambda x: factor * x, grads)
            updates, opt = optimizer.update(grads, old.opt, old.params)
            params = optax.apply_updates(old.params, updates)
            new = Trained(params, opt, average(config.ema_decay, old.ema, params))
            squares = [optax.tree.norm(each, squared=True) for each in (updates, old.params)]
            return choose(finite, new, old), jnp.stack(squares)

        params = select(state.params, config.frozen)
        old = Trained(params, state.opt, pick(state.ema, params))
        if any(map(is_on_host, jax.tree.leaves(old))):
            new, squares = change_in_parts(change, grads, old, [is_stacked[path] for path in paths_of(params)])
        else:
            new, squares = change(grads, old)
        ratio = jnp.sqrt(squares[0]) / jnp.maximum(jnp.sqrt(squares[1]), jnp.finfo(jnp.float32).tiny)
        ema = replace(state.ema, new.ema)
        if config.ema_copies_frozen:
            still = drop(state.ema, paths_of(params))
            ema = replace(ema, put_like(choose(finite, pick(state.params, still), to_device(still)), still))
        return TrainState(state.step + 1, replace(state.params, new.params), new.opt, ema), ratio
    return update


def change_in_parts(change: Change, grads: Params, old: Trained, is_stacked: list[bool]
                    ) -> tuple[Trained, Float[Array, "2"]]:
    """The same as `change(grads, old)`, one parameter after the other, and layer by layer where it has some."""
    tree = jax.tree.structure(old.params)
    nodes, whole = jax.tree.flatten(old.opt, is_leaf=lambda node: isinstance(node, dict))
    columns = [jax.tree.leaves(node) if isinstance(node, dict) else [node] * tree.num_leaves for node in nodes]
    parts = zip(*map(jax.tree.leaves, (grads, old.params, old.ema)), zip(*columns), is_stacked, strict=True)
    changed = [(change_layers if stacked else change_whole)(change, grad, Trained(param, opt, ema))
               for grad, param, ema, opt, stacked in
               ((*part, whole.unflatten(opt), stacked) for *part, opt, stacked in parts)]
    news, squares = zip(*changed)
    columns = zip(*(whole.flatten_up_to(new.opt) for new in news))
    opt = [tree.unflatten(column) if isinstance(node, dict) else column[0]
           for node, column in zip(nodes, columns, strict=True)]
    params, ema = (tree.unflatten([getattr(new, name) for new in news]) for name in ("params", "ema"))
    return Trained(params, whole.unflatten(opt), ema), sum(squares)


def change_whole(change: Change, grad: Array, old: Trained) -> tuple[Trained, Float[Array, "2"]]:
    """A parameter at once; results go where that lies which they replace."""
    new, squares = change(grad, to_device(old))
    return put_like(new, old), squares


def change_layers(change: Change, grads: Array, old: Trained) -> tuple[Trained, Float[Array, "2"]]:
    """A parameter layer by layer, each written where it was read.

    Layers that a scan took in and gave out would be there twice, in either memory.
    """
    def one(stacks: Trained, index: Int[Array, ""]):
        at = lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        put = lambda stack, layer: jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
        # The optimiser's counters have no layer: each layer finds them as they were, and counts once.
        layer = jax.tree.map(lambda stack, was: at(stack) if stack.ndim else was, stacks, old)
        new, squares = change_whole(change, at(grads), layer)
        written = jax.tree.map(lambda stack, layer: put(stack, layer) if stack.ndim else layer, stacks, new)
        return written, squares
    new, squares = jax.lax.scan(one, old, jnp.arange(len(grads)))
    return new, squares.sum(0)


def choose(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def is_on_host(leaf: Array) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def put_like(new: Any, old: Any) -> Any:
    one = lambda new, old: jax.device_put(new, jax.memory.Space.Host) if is_on_host(old) else new
    return jax.tree.map(one, new, old)
