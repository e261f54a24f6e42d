"""Trains a small model on arrays and resumes: for the parts of a base that are trained by themselves."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm

from irg_jax.checkpoints.bundle import FOLDER as BUNDLES
from irg_jax.checkpoints.bundle import Bundles, latest_step
from irg_jax.checkpoints.seals import set_bad_aside
from irg_jax.models.functional import Params

Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Adam with a warm-up and a cosine to zero."""

    total_steps: int
    batch_size: int
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    save_every: int = 200
    seed: int = 0

    def __post_init__(self):
        if min(self.total_steps, self.batch_size, self.save_every) < 1:
            raise ValueError(f"total_steps {self.total_steps}, batch_size {self.batch_size} and save_every "
                             f"{self.save_every} must be positive")


def make_step(loss: Loss, config: FitConfig, optimizer: optax.GradientTransformation) -> Callable:
    """step(state, batch) -> (state, metrics); state is {step, params, opt, ema}."""
    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], 1 - config.ema_decay)
        return {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}, metrics
    return step


def fit(loss: Loss, init: Callable[[], Params], draw_batch: Callable[[int], Any], config: FitConfig,
        folder: pathlib.Path) -> Params:
    """The averaged parameters after `total_steps`; bundles in `folder`, whose name the progress bar shows.

    Whatever ends it, a save under way is finished first. A bundle that is not what was written is set aside.

    Args: loss takes (params, batch, key) and returns it with metrics; draw_batch depends on its step alone,
        so that a resumed run goes on as it would have.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, min(100, config.total_steps // 5),
                                                  config.total_steps, 0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.99))
    step = jax.jit(make_step(loss, config, optimizer), donate_argnums=0)
    for sentence in set_bad_aside(folder / BUNDLES):
        logging.error("%s", sentence)
    start = latest_step(folder)
    with contextlib.closing(Bundles(folder, keep=1)) as bundles:
        params = jax.jit(init)()
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(params),
                 "ema": jax.tree.map(jnp.copy, params)}
        if start:
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            abstract = jax.tree.map(place, state)
            ema = abstract.pop("ema")
            items = bundles.restore(start, state=abstract, ema=ema)
            state = items["state"] | {"ema": items["ema"]}
        bar = tqdm.tqdm(range(start, config.total_steps), initial=start, total=config.total_steps,
                        desc=folder.name, unit="step", mininterval=1.0)
        for index in bar:
            state, metrics = step(state, draw_batch(index))
            if index % 20 == 0:
                bar.set_postfix({name: f"{float(value):.4f}" for name, value in metrics.items()}, refresh=False)
            if (index + 1) % config.save_every == 0 or index + 1 == config.total_steps:
                item = dict(state)
                ema = item.pop("ema")
                bundles.save(index + 1, state=item, ema=ema, position={"next_step": index + 1})
    return state["ema"]
