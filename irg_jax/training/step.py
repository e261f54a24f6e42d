"""One training step: a pure function from state and global batch to new state and metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from data_pipelines.batch import PackedBatch
from irg_jax.models.functional import Functional, Params
from irg_jax.training.losses import (
    Flow,
    LossConfig,
    Totals,
    count_totals,
    encode_latents,
    make_flow,
    mean_losses,
    token_losses,
)
from irg_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, update_ema


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step; float32."""

    step: jax.Array
    params: Params
    opt: optax.OptState
    ema: Params


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


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params),
                      jax.tree.map(jnp.copy, params))


def make_loss(model: Functional, config: StepConfig) -> Callable:
    """(params, part of the batch, its flow, totals) -> (weighted sum, (ce, mse)); shares of global means."""
    def loss(params: Params, batch: PackedBatch, flow: Flow, totals: Totals):
        ce, error = token_losses(model.bind(params), batch, flow, dtype=jnp.dtype(config.dtype),
                                 remat=config.remat)
        ce, mse = mean_losses(ce, error, batch, totals)
        return config.loss.ce_weight * ce + config.loss.mse_weight * mse, (ce, mse)
    return loss


def make_gradient(model: Functional, config: StepConfig) -> Callable:
    """(params, batch, flow) -> ((ce, mse), gradient) of the means over the whole batch.

    With accumulation the packs are taken in parts, and the divisors are still those of the whole.
    """
    value_and_grad = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def gradient(params: Params, batch: PackedBatch, flow: Flow):
        totals = count_totals(batch)
        if config.accumulate == 1:
            (_, losses), grads = value_and_grad(params, batch, flow, totals)
            return losses, grads
        # Every n-th pack: a part is then spread over all devices as the whole is, and nothing moves.
        split = lambda x: x.reshape(len(x) // config.accumulate, config.accumulate, *x.shape[1:])
        parts = jax.tree.map(lambda x: split(x).swapaxes(0, 1), (batch, flow))

        def add(total, part):
            (_, losses), grads = value_and_grad(params, *part, totals)
            return jax.tree.map(jnp.add, total, (losses, grads)), None
        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, parts)[0]
    return gradient


def make_update(config: StepConfig, optimizer: optax.GradientTransformation) -> Callable:
    """(state, grads) -> new state: optimiser, then EMA."""
    def update(state: TrainState, grads: Params) -> TrainState:
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt, update_ema(config.optimizer, state.ema, params))
    return update


def make_step(model: Functional, vae: Functional, config: StepConfig) -> Callable:
    """Builds `step(state, vae_params, batch) -> (state, metrics)`, to be jitted with donation of state.

    Noise depends on (seed, step) alone, never on the mesh or on accumulation. Metrics are of the batch
    and the parameters before the update. If loss or gradient is not finite, parameters, moments and EMA stay as
    they were (`finite`).
    """
    gradient = make_gradient(model, config)
    update = make_update(config, make_optimizer(config.optimizer, config.total_steps, model.shapes))
    rate = learning_rate(config.optimizer, config.total_steps)

    def step(state: TrainState, vae_params: Params, batch: PackedBatch) -> tuple[TrainState, dict[str, Any]]:
        key_posterior, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        latent = encode_latents(vae.bind(vae_params), batch, config.loss, config.canvas, key_posterior,
                                jnp.dtype(config.dtype))
        noise = jax.random.normal(key_noise, latent.shape, jnp.float32)
        flow = make_flow(batch, latent, noise, config.loss.timestep_shift)
        (ce, mse), grads = gradient(state.params, batch, flow)
        streams = (batch.text_rows, batch.vit_rows, batch.latent_rows)
        tokens = sum(jnp.sum(rows.last >= 0) for rows in streams)   # without padding
        metrics = {"loss": config.loss.ce_weight * ce + config.loss.mse_weight * mse, "ce": ce, "mse": mse,
                   "tokens": tokens,
                   "learning_rate": rate(state.step), "grad_norm": optax.tree.norm(grads)}
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        skipped = dataclasses.replace(state, step=state.step + 1)   # the next step has noise of its own
        keep = lambda new, old: jnp.where(metrics["finite"], new, old)
        return jax.tree.map(keep, update(state, grads), skipped), metrics
    return step
