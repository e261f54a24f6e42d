"""Trains an autoencoder on pictures: for the miniature's base alone, IRG's own is frozen.

Axes: B images, H and W pixels. The loss is |x - y| + (x - y)^2 a grey value, plus a small KL term.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from irg_jax.checkpoints.bundle import Bundles
from irg_jax.models.config import VAEConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import normalize_pixels


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The recipe."""

    total_steps: int
    batch_size: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4      # of the mean KL a latent value
    ema_decay: float = 0.995
    num_images: int = 4000
    crop: int = 32               # pixels a side of random crops, which cost little and teach most
    full_steps: int = 300        # last steps, on whole images
    save_every: int = 200
    seed: int = 0


def make_step(vae: Functional, config: AutoencoderConfig, optimizer: optax.GradientTransformation):
    """step(state, uint8 images [B H W 3]) -> (state, metrics); state is (step, params, opt, ema)."""
    def loss(params, images, key):
        model, target = vae.bind(params), normalize_pixels(images, jnp.float32)
        mean, logvar = model.encode(target)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = model.decoder(z) - target
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(error) + error**2) + config.kl_weight * kl, (jnp.mean(error**2), kl)

    def step(state, images):
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        (_, (mse, kl)), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], images, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], 1 - config.ema_decay)
        new = {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}
        return new, {"mse": mse, "kl": kl}
    return step


def train_autoencoder(vae: Functional, config: AutoencoderConfig, images: np.ndarray,
                      folder: pathlib.Path) -> Params:
    """Trains on uint8 images [N H W 3], resuming from `folder`; returns the averaged parameters."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, min(100, config.total_steps // 5),
                                                  config.total_steps, 0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.99))
    bundles = Bundles(folder, keep=1)
    start = bundles.latest() or 0
    params = jax.jit(lambda: vae.init(config.seed))()
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(params),
             "ema": jax.tree.map(jnp.copy, params)}
    if start:
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        abstract = jax.tree.map(place, state)
        ema = abstract.pop("ema")
        items = bundles.restore(start, state=abstract, ema=ema)
        state = items["state"] | {"ema": items["ema"]}
    step = jax.jit(make_step(vae, config, optimizer), donate_argnums=0)
    bar = tqdm.tqdm(range(start, config.total_steps), initial=start, total=config.total_steps,
                    desc="autoencoder", unit="step", mininterval=1.0)
    for index in bar:
        state, metrics = step(state, draw_batch(config, images, index))
        if index % 20 == 0:
            bar.set_postfix(mse=f"{float(metrics['mse']):.5f}", kl=f"{float(metrics['kl']):.2f}", refresh=False)
        if (index + 1) % config.save_every == 0 or index + 1 == config.total_steps:
            item = dict(state)
            ema = item.pop("ema")
            bundles.save(index + 1, state=item, ema=ema, position={"next_step": index + 1})
    bundles.close()
    return state["ema"]


def draw_batch(config: AutoencoderConfig, images: np.ndarray, index: int) -> np.ndarray:
    """The batch of a step; it depends on (seed, step) alone, so that a resumed run goes on as it would have."""
    rng = np.random.default_rng((config.seed, index))
    batch = images[rng.integers(len(images), size=config.batch_size)]
    if index >= config.total_steps - config.full_steps:
        return batch
    top, left = rng.integers(images.shape[1] - config.crop + 1, size=2)
    return batch[:, top:top + config.crop, left:left + config.crop]


def measure_latents(vae: Functional, params: Params, config: VAEConfig, images: np.ndarray) -> VAEConfig:
    """The config with the scale and shift that give its latents mean 0 and deviation 1 on `images`."""
    encode = jax.jit(lambda x: vae.bind(params).encode(normalize_pixels(x, jnp.float32))[0])
    latents = np.concatenate([encode(images[i:i + 50]) for i in range(0, len(images), 50)])
    return dataclasses.replace(config, scale_factor=round(float(1 / latents.std()), 4),
                               shift_factor=round(float(latents.mean()), 4))
