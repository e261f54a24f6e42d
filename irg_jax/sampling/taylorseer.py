"""Steps that do without the network: what its layers add is extrapolated from steps that ran it.

The last hidden state of a residual network is what was embedded and what each layer added. Extrapolation is
linear, so that of the sum is the sum of all layers': one tensor a computed step is kept, and none of the
layers' own. What was embedded is known at every step.

Axes: K computed steps that are kept, N points of time.
Source: TaylorSeer (arXiv 2503.06923), `enable_taylorseer` of BAGEL. There Taylor's formula with differences of
each layer takes steps as equally long; here it is the polynomial in t through the last computed steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from irg_jax.sampling.config import FlowConfig


class Plan(NamedTuple):
    """What is known of all steps before the first."""

    is_computed: Bool[np.ndarray, "N-1"]
    weights: Float[np.ndarray, "N-1 K"]   # of the last computed steps, newest first, where it is not


def plan_steps(times: Float[np.ndarray, "N"], branches: Sequence[int], config: FlowConfig) -> Plan:
    """Computed are the first steps, each `taylorseer_interval`-th from then on, and where a branch is new.

    Args: branches are those of each step; a new one has nothing to be extrapolated from, so all begin anew.
    """
    is_computed, weights = np.zeros(len(branches), bool), np.zeros((len(branches), config.taylorseer_order + 1))
    computed: list[int] = []
    for step, count in enumerate(branches):
        if step and count > branches[step - 1]:
            computed = []
        if len(computed) < config.taylorseer_first or step - computed[-1] >= config.taylorseer_interval:
            is_computed[step] = True
            computed.append(step)
            continue
        known = times[computed[:-config.taylorseer_order - 2:-1]].astype(np.float64)
        weights[step, :len(known)] = _lagrange(known, times[step])
    return Plan(is_computed, weights.astype(np.float32))


def _lagrange(known: Float[np.ndarray, "K"], t: float) -> Float[np.ndarray, "K"]:
    """What each of some values counts in the polynomial through all of them, at t."""
    others = ~np.eye(len(known), dtype=bool)
    ratios = (t - known[None, :]) / np.where(others, known[:, None] - known[None, :], 1)
    return np.prod(np.where(others, ratios, 1), axis=1)


def extrapolate(weights: Float[Array, "K"], kept: Float[Array, "K B S D"]) -> Float[Array, "B S D"]:
    """Summed in float32, as weights of both signs are over 1."""
    return jnp.einsum("k,kbsd->bsd", weights, kept, preferred_element_type=jnp.float32).astype(kept.dtype)


def keep(kept: Float[Array, "K B S D"], added: Float[Array, "B S D"]) -> Float[Array, "K B S D"]:
    """With the newest first; the oldest is forgotten."""
    return jnp.concatenate([added[None], kept[:-1]])


def follow(kept: Float[Array, "K B S D"] | None, order: int, like: jax.ShapeDtypeStruct
           ) -> Float[Array, "K B S D"]:
    """What is kept for the next steps: of the first branches before, or nothing yet if there are more."""
    if kept is not None and kept.shape[2] >= like.shape[1]:
        return kept[:, :, :like.shape[1]]
    return jnp.zeros((order + 1, *like.shape), like.dtype)
