"""What a run carries from step to step."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from irg_jax.models.functional import Params
from irg_jax.training.optimizer import drop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step; float32, but for `params` that never train.

    `ema` and moments lack these.
    """

    step: jax.Array
    params: Params
    opt: optax.OptState
    ema: Params


def create_state(params: Params, optimizer: optax.GradientTransformation, never: Collection[str] = ()
                 ) -> TrainState:
    """Args: never are the dotted paths of parameters that never train."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params),
                      jax.tree.map(jnp.copy, drop(params, never)))
