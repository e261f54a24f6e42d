"""Draws an image after each of B contexts: steps from noise, steered by guidance.

Axes: B contexts, G latent tokens, C values of a latent token.
Source: `generate_image` and `_forward_flow` of BAGEL's modeling/bagel/bagel.py.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from irg_jax.models.irg import IRG
from irg_jax.models.joint import KeyValue
from irg_jax.sampling.cache import Context, View, predict_added, predict_velocities, velocities_with
from irg_jax.sampling.config import FlowConfig
from irg_jax.sampling.taylorseer import Plan, extrapolate, follow, keep, plan_steps

Velocity = Float[Array, "B G C"]


class Branches(NamedTuple):
    """The contexts of guidance: all there is, that without the text to follow, without images.

    The second is always an earlier view of the first, the third if no image lies between.
    """

    main: Context
    cfg_text: View
    cfg_img: View | Context | None = None   # where the settings do not ask for it

    def seen(self, config: FlowConfig) -> list[tuple[KeyValue, list[View]]]:
        """Caches and the views of them that a guided step needs, in the order of `guide`."""
        views = [self.main.view, self.cfg_text]
        if not config.needs_cfg_img:
            return [(self.main.kv, views)]
        if isinstance(self.cfg_img, View):
            return [(self.main.kv, [*views, self.cfg_img])]
        return [(self.main.kv, views), (self.cfg_img.kv, [self.cfg_img.view])]


def timesteps(config: FlowConfig) -> Float[np.ndarray, "N"]:
    """Points from 1 to 0, denser near 1 the larger the shift: t' = s t / (1 + (s - 1) t)."""
    t = np.linspace(1, 0, config.num_timesteps, dtype=np.float32)
    shift = np.float32(config.timestep_shift)
    return shift * t / (1 + (shift - 1) * t)


def draw_latent(model: IRG, branches: Branches, noise: Float[Array, "B G C"],
                position: Int[Array, "G"], brackets: Int[Array, "2"], config: FlowConfig
                ) -> Float[Array, "B G C"]:
    """The latent at t = 0, in float32, after `num_timesteps - 1` steps from `noise`.

    Only the branches that a step needs are run, all in one pass. Which these are is known before compiling, so
    the steps fall into a few scans, guided or not.
    """
    times = timesteps(config)
    low, high = np.float32(config.cfg_interval)
    is_guided = (times[:-1] > low) & (times[:-1] <= high) & (config.cfg_text_scale > 1)
    latent, start, kept = noise.astype(jnp.float32), 0, None
    weights = _weights(times, is_guided) if config.solver == "adams" else None
    plan = _plan(branches, times, is_guided, config) if config.enable_taylorseer else None
    for guided, run in itertools.groupby(is_guided):
        seen = branches.seen(config) if guided else [(branches.main.kv, [branches.main.view])]
        predict = functools.partial(_predict, model, seen, brackets, position)

        def step(carry, point, predict=predict):
            latent, last, kept = carry
            time, following, weight, plan = point
            velocities, kept = predict(latent, time, kept, plan)
            velocity = guide(velocities, config)
            if weight is None:
                return (latent - velocity * (time - following), None, kept), None
            ahead = velocity + weight * (velocity - last)
            return (latent - ahead * (time - following), velocity, kept), None
        stop = start + len(list(run))
        last, share = (None, None) if weights is None else (jnp.zeros_like(latent), weights[start:stop])
        part = None if plan is None else jax.tree.map(lambda x: x[start:stop], plan)
        kept = None if plan is None else _follow(model, seen, kept, latent, config)
        points = times[start:stop], times[start + 1:stop + 1], share, part
        (latent, _, kept), _ = jax.lax.scan(step, (latent, last, kept), points)
        start = stop
    return latent


def _plan(branches: Branches, times: Float[np.ndarray, "N"], is_guided: Bool[np.ndarray, "N-1"],
          config: FlowConfig) -> Plan:
    guided = sum(len(views) for _, views in branches.seen(config))
    return plan_steps(times, np.where(is_guided, guided, 1).tolist(), config)


def _follow(model: IRG, seen, kept: jax.Array | None, latent: Velocity, config: FlowConfig) -> jax.Array:
    """What is kept of steps before, for those that run these branches."""
    kv, _ = seen[0]
    tokens = latent.shape[1] * sum(len(views) for _, views in seen)
    size = latent.shape[0], tokens, model.decoder.config.hidden_size
    return follow(kept, config.taylorseer_order, jax.ShapeDtypeStruct(size, kv.key.dtype))


def _predict(model: IRG, seen, brackets, position, latent: Velocity, time: Float[Array, ""],
             kept: jax.Array | None, plan: Plan | None) -> tuple[list[Velocity], jax.Array | None]:
    """The branches' velocities, computed or extrapolated, and what is kept for the steps that follow."""
    if plan is None:
        return predict_velocities(model, seen, brackets, latent, time, position), None

    def compute(kept):
        added = predict_added(model, seen, brackets, latent, time, position)
        return added, keep(kept, added)
    do_without = lambda kept: (extrapolate(plan.weights, kept), kept)
    added, kept = jax.lax.cond(plan.is_computed, compute, do_without, kept)
    return velocities_with(model, added, latent, time, position), kept


def _weights(times: Float[np.ndarray, "N"], is_guided: Bool[np.ndarray, "N-1"]
             ) -> Float[np.ndarray, "N-1"]:
    """How much of the change since the last velocity a step adds: half its length over the last one's.

    Nothing where there is no last one, or where guidance begins or ends: there the velocity leaps.
    """
    length = times[:-1] - times[1:]
    goes_on = is_guided[1:] == is_guided[:-1]
    rest = np.where(goes_on, 0.5 * length[1:] / length[:-1], 0)
    return np.concatenate([np.zeros(1), rest]).astype(np.float32)


def guide(velocities: list[Velocity], config: FlowConfig) -> Velocity:
    """One velocity of the branches': [main], [main, cfg_text] or [main, cfg_text, cfg_img].

    Guidance makes velocities longer, which burns colours; the rescale brings the guided one back to
    at most the length of the unguided. `text_channel` does so per token before image guidance,
    `channel` per token and `global` per image after both.
    """
    main, *guides = velocities
    if not guides:
        return main
    guided = guides[0] + config.cfg_text_scale * (main - guides[0])
    by_text = config.cfg_renorm_type == "text_channel"
    if by_text:
        guided = _renorm(guided, main, -1, config.cfg_renorm_min)
    if len(guides) > 1:
        guided = guides[1] + config.cfg_img_scale * (guided - guides[1])
    if by_text:
        return guided
    axes = (-2, -1) if config.cfg_renorm_type == "global" else -1
    return _renorm(guided, main, axes, config.cfg_renorm_min)


def _renorm(guided: Velocity, main: Velocity, axes, least: float) -> Velocity:
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axes, keepdims=True))
    return guided * jnp.clip(norm(main) / (norm(guided) + 1e-8), least, 1.0)
