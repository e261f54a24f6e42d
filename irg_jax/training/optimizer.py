"""AdamW with clipping, warm-up and a schedule, over the parameters that train.

A gradient and the moments are trees of the parameters that train and of no others: what is frozen costs
neither.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from irg_jax.models.functional import Params
from irg_jax.models.groups import GROUPS, group_of, is_below, keep, paths_of
from irg_jax.models.lora import is_adapter
from irg_jax.training.compact import make_packing, scale_by_compact_adam


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's values. `schedule` is constant, or linear or cosine down to `final_learning_rate`."""

    learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    final_learning_rate: float = 0.0  # at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0                 # global gradient norm
    moments: str = "float32"          # or "bfloat16", "int8": 8, 4 or 2 bytes a parameter, see `compact`
    frozen: tuple[str, ...] = ()      # groups, or dotted prefixes of parameters, that do not train
    ema_decay: float = 0.995
    ema_copies_frozen: bool = True    # IRG copies frozen weights into the EMA, BAGEL leaves them

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'constant', 'linear' or 'cosine'")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be positive, and float('inf') clips nothing")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.moments != "float32":
            make_packing(self.b1, self.b2, self.moments)    # refused now, or never
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"final_learning_rate is {self.final_learning_rate}; it must be between 0 and "
                             f"learning_rate = {self.learning_rate}")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """lr * min(1, step / warmup_steps), then constant, linear or half a cosine; step 0 is the first."""
    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rate = config.learning_rate * jnp.minimum(1.0, step / max(config.warmup_steps, 1)
                                                  if config.warmup_steps else 1.0)
        if config.schedule == "constant":
            return rate
        progress = jnp.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        final = config.final_learning_rate
        # Still warming up, the rate may be below the final one.
        return jnp.where(step < config.warmup_steps, rate, final + (rate - final) * left)
    return schedule


def trainable_mask(params: Params, frozen: tuple[str, ...]) -> Any:
    """Tree of bool: what is not frozen, and of groups that have adapters only these.

    Raises: ValueError if a name of `frozen` is no group and no parameter's prefix.
    """
    paths = paths_of(params)
    prefixes = [prefix for name in frozen for prefix in GROUPS.get(name, (name,))]
    for prefix in prefixes:
        if not any(is_below(path, prefix) for path in paths):
            tops = sorted({path.split(".")[0] for path in paths})
            raise ValueError(f"optimizer.frozen: no parameter is at or below {prefix!r}; the groups are "
                             f"{', '.join(GROUPS)}, the tops {', '.join(tops)}")
    adapted = {group_of(path) for path in paths if is_adapter(path)}
    flags = [not any(is_below(path, prefix) for prefix in prefixes)
             and (not adapted or is_adapter(path) or group_of(path) not in adapted) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def select(params: Params, frozen: tuple[str, ...]) -> Params:
    """What trains, as a tree that lacks the rest. Raises: as `trainable_mask`, or if nothing is left."""
    if not (chosen := keep(params, jax.tree.leaves(trainable_mask(params, frozen)))):
        raise ValueError(f"optimizer.frozen is {frozen}: nothing is left to train")
    return chosen


def never_trained(params: Params, frozen: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Dotted paths of what trains in none of the phases, whose `frozen` are given. Raises: as `select`."""
    trained = {path for each in frozen for path in paths_of(select(params, each))}
    return tuple(path for path in paths_of(params) if path not in trained)


def drop(params: Params, paths: Collection[str]) -> Params:
    """A tree that lacks these leaves."""
    return keep(params, [path not in paths for path in paths_of(params)])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW; the gradient is clipped before (`clip_factor`).

    `init` takes all parameters and leaves out what does not train. `update` goes value by value: it may be
    given any part of gradient, state and parameters.
    """
    adamw = optax.chain(
        optax.identity(),    # where clipping had its place: checkpoints name what follows by its number
        scale_by_compact_adam(config.b1, config.b2, config.eps, config.moments),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)))
    return optax.GradientTransformation(lambda params: adamw.init(select(params, config.frozen)), adamw.update)


def clip_factor(config: OptimizerConfig, norm: Float[Array, ""]) -> Float[Array, ""]:
    """What a gradient is multiplied by, that its norm is at most `clip`."""
    return jnp.where(norm < config.clip, 1.0, config.clip / norm)


def average(decay: float, ema: Any, params: Any) -> Any:
    """decay * ema + (1 - decay) * params, in float32."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
