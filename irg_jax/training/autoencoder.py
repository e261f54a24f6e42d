"""Trains an autoencoder on pictures: for the miniature's base alone, IRG's own is frozen.

Axes: B images, H and W pixels. The loss is |x - y| + (x - y)^2 a grey value, plus a small KL term.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax.models.config import VAEConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import normalize_pixels
from irg_jax.training.fit import FitConfig, Loss, fit


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(FitConfig):
    """The recipe."""

    kl_weight: float = 1e-4      # of the mean KL a latent value
    num_images: int = 4000
    crop: int = 32               # pixels a side of random crops, which cost little and teach most
    full_steps: int = 300        # last steps, on whole images


def make_loss(vae: Functional, kl_weight: float) -> Loss:
    """Of uint8 images [B H W 3]."""
    def loss(params, images, key):
        model, target = vae.bind(params), normalize_pixels(images, jnp.float32)
        mean, logvar = model.encode(target)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = model.decoder(z) - target
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(error) + error**2) + kl_weight * kl, {"mse": jnp.mean(error**2), "kl": kl}
    return loss


def train_autoencoder(vae: Functional, config: AutoencoderConfig, images: np.ndarray,
                      folder: pathlib.Path) -> Params:
    """Trains on uint8 images [N H W 3], resuming from `folder`; returns the averaged parameters."""
    return fit(make_loss(vae, config.kl_weight), lambda: vae.init(config.seed),
               lambda index: draw_batch(config, images, index), config, folder)


def draw_batch(config: AutoencoderConfig, images: np.ndarray, index: int) -> np.ndarray:
    """The batch of a step, cropped until the last ones."""
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
