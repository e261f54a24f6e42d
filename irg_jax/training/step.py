"""One training step: a pure function from state and global batch to new state and metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.batch import PackedBatch
from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import GROUPS, group_of, paths_of, replace
from irg_jax.training.losses import (
    Flow,
    LossConfig,
    Losses,
    count_totals,
    encode_latents,
    make_flow,
    mean_losses,
    token_losses,
)
from irg_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, select
from irg_jax.training.state import TrainState
from irg_jax.training.update import make_update


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the compiled step depends on."""

    loss: LossConfig
    optimizer: OptimizerConfig
    total_steps: int
    seed: int
    canvas: int                  # side of the frozen encoder's canvas, in latent tokens
    accumulate: int = 1          # parts that a step's packs are taken in, one after the other
    dtype: str = "float32"       # of matmuls; softmax, norms, losses and optimiser stay float32
    remat: str = "full"          # see `irg_jax.models.stack`
    groups: tuple[str, ...] = () # of records, whose losses are told apart


def make_loss(model: Functional, config: StepConfig) -> Callable:
    """(what trains, params, part of the batch, its flow, totals) -> (weighted sum, losses).

    Shares of global means. A loss of weight 0 is told and has no gradient.
    """
    weights = config.loss.ce_weight, config.loss.mse_weight

    def loss(trained: Params, params: Params, batch: PackedBatch, flow: Flow, totals: Losses):
        params = replace(params, trained)
        ce, error = token_losses(model.bind(params), batch, flow, dtype=jnp.dtype(config.dtype),
                                 remat=config.remat)
        losses = mean_losses(ce, error, batch, totals)
        return sum(weight * loss for weight, loss in zip(weights, (losses.ce, losses.mse)) if weight), losses
    return loss


def make_gradient(model: Functional, config: StepConfig) -> Callable:
    """(params, batch, flow) -> (losses, gradient of what trains) of the means over the whole batch.

    With accumulation the packs are taken in parts, and the divisors are still those of the whole.
    """
    value_and_grad = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def gradient(params: Params, batch: PackedBatch, flow: Flow):
        totals, trained = count_totals(batch, len(config.groups)), select(params, config.optimizer.frozen)
        if config.accumulate == 1:
            (_, losses), grads = value_and_grad(trained, params, batch, flow, totals)
            return losses, grads
        # Every n-th pack: a part is then spread over all devices as the whole is, and nothing moves.
        split = lambda x: x.reshape(len(x) // config.accumulate, config.accumulate, *x.shape[1:])
        parts = jax.tree.map(lambda x: split(x).swapaxes(0, 1), (batch, flow))

        def add(total, part):
            (_, losses), grads = value_and_grad(trained, params, *part, totals)
            return jax.tree.map(jnp.add, total, (losses, grads)), None
        zero = (jax.tree.map(jnp.zeros_like, totals), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(add, zero, parts)[0]
    return gradient


def name_losses(losses: Losses, batch: PackedBatch, groups: tuple[str, ...]) -> dict[str, jax.Array]:
    """`ce`, `mse`, and those of every group, `ce/<group>`; NaN where a batch has no loss token of a group."""
    totals = count_totals(batch, len(groups))
    of_groups = {f"{kind}/{name}": jnp.where(total[number] > 0, loss[number], jnp.nan)
                 for kind, loss, total in (("ce", losses.group_ce, totals.group_ce),
                                           ("mse", losses.group_mse, totals.group_mse))
                 for number, name in enumerate(groups)}
    return {"ce": losses.ce, "mse": losses.mse} | of_groups


def measure_gradient(grads: Params) -> dict[str, jax.Array]:
    """Norms: `grad_norm`, and `grad_norm/<group>` of every group that trains."""
    squares = {name: [] for name in GROUPS}
    for path, leaf in zip(paths_of(grads), jax.tree.leaves(grads), strict=True):
        squares[group_of(path)].append(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
    squares = {name: sum(parts) for name, parts in squares.items() if parts}
    return {"grad_norm": jnp.sqrt(sum(squares.values()))} | {
        f"grad_norm/{name}": jnp.sqrt(square) for name, square in squares.items()}


def make_step(model: Functional, vae: Functional, config: StepConfig) -> Callable:
    """Builds `step(state, vae_params, batch) -> (state, metrics)`, to be jitted with donation of state.

    Noise depends on (seed, step) alone, never on the mesh or on accumulation. Metrics are of the batch
    and the parameters before the update. If loss or gradient is not finite, parameters, moments and EMA stay as
    they were (`finite`).
    """
    gradient = make_gradient(model, config)
    update = make_update(model, config.optimizer, make_optimizer(config.optimizer, config.total_steps))
    rate = learning_rate(config.optimizer, config.total_steps)

    def step(state: TrainState, vae_params: Params, batch: PackedBatch) -> tuple[TrainState, dict[str, Any]]:
        key_posterior, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        latent = encode_latents(vae.bind(vae_params), batch, config.loss, config.canvas, key_posterior,
                                jnp.dtype(config.dtype))
        noise = jax.random.normal(key_noise, latent.shape, jnp.float32)
        flow = make_flow(batch, latent, noise, config.loss.timestep_shift)
        losses, grads = gradient(state.params, batch, flow)
        streams = (batch.text_rows, batch.vit_rows, batch.latent_rows)
        tokens = sum(jnp.sum(rows.last >= 0) for rows in streams)   # without padding
        loss = config.loss.ce_weight * losses.ce + config.loss.mse_weight * losses.mse
        metrics = {"loss": loss, **name_losses(losses, batch, config.groups), "tokens": tokens,
                   "learning_rate": rate(state.step), **measure_gradient(grads)}
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        new, metrics["update_ratio"] = update(state, grads, metrics["grad_norm"], metrics["finite"])
        return new, metrics
    return step
