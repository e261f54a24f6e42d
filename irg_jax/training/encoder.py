"""Trains the vision encoder and its connector by themselves: for the miniature's base alone.

BAGEL starts from a trained SigLIP2; learning to see through the language model alone is slow. Here linear
heads read what is where out of what the language model will be given, and are thrown away afterwards.
Axes: B images, V patches, P values of a patch, E language-model width.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.random import default_rng

from data_pipelines.batch import Rows
from data_pipelines.config import ImageTransform
from data_pipelines.images import grid_position, patchify, resize
from data_pipelines.shapes.labels import KINDS, MOST, NOTHING, Labels, label
from data_pipelines.shapes.records import generator, shown
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import normalize_pixels
from irg_jax.models.layers import Linear, sincos_table
from irg_jax.models.vision import Connector, VisionEncoder
from irg_jax.training.fit import FitConfig, Loss, fit

SCENE = (len(BACKGROUNDS), len(SHAPES) * len(COLOURS), len(SHAPES) * (MOST + 1))
CELL = tuple(len(words) + 1 for words in KINDS.values())   # the last class: nothing is there


@dataclasses.dataclass(frozen=True)
class EncoderConfig(FitConfig):
    """The recipe."""

    num_images: int = 20000
    side: int = 64       # pixels of a rendered scene
    noise: float = 0.5   # deviation added to tokens of deviation 1: what a thing is must not be a faint detail


class Examiner(nnx.Module):
    """Encoder and connector, and the heads that read them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.llm.hidden_size
        self.side = config.vit_max_num_patch_per_side
        self.vit = VisionEncoder(config.vit, config.num_vit_layers, config.vit_max_num_patch_per_side,
                                 rngs=rngs)
        self.connector = Connector(config.vit.hidden_size, width, rngs=rngs)
        self.scene = Linear(width, sum(SCENE), (None, None), rngs=rngs)
        self.cell = Linear(width, sum(CELL), (None, None), rngs=rngs)

    def __call__(self, patches: Float[Array, "B V P"], position: Int[Array, "V"], noise: Float[Array, "B V E"]
                 ) -> tuple[list[Float[Array, "B F"]], list[Float[Array, "B V F"]]]:
        """Background, presence and counts of the scene; what is said of each cell, a kind at a time.

        Tokens are placed and normed as the language model's first layer will, then `noise` is added: tokens so
        large that their own place drowns in them would be of no use to it.
        """
        batch, count, _ = patches.shape
        same = lambda value: jnp.full((batch, count), value, jnp.int32)
        rows = Rows(same(jnp.arange(count)), same(0), same(0), same(count - 1), same(0).astype(bool), same(0))
        hidden = self.connector(self.vit(patches, jnp.broadcast_to(position, (batch, count)), rows))
        hidden = hidden + jnp.asarray(sincos_table(self.side, hidden.shape[-1]))[position]
        hidden = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6) + noise
        split = lambda x, sizes: jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=-1)
        return split(self.scene(hidden.mean(1)), SCENE), split(self.cell(hidden), CELL)


def make_loss(examiner: Functional, position: np.ndarray, *, width: int, noise: float) -> Loss:
    """Of (uint8 patches [B V P], Labels), in float32; metrics are shares of right answers."""
    def loss(params, batch, key):
        patches, labels = batch
        noised = noise * jax.random.normal(key, (*patches.shape[:2], width))
        examined = examiner.bind(params)(normalize_pixels(patches, jnp.float32), jnp.asarray(position), noised)
        (background, present, count), cells = examined
        entropy = lambda logits, want: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, want))
        wanted = [jnp.where(want == NOTHING, logits.shape[-1] - 1, want)
                  for logits, want in zip(cells, jnp.moveaxis(labels.cells, -1, 0))]
        count = count.reshape(*labels.count.shape, -1)
        total = (entropy(background, labels.background) + entropy(count, labels.count)
                 + 8 * jnp.mean(optax.sigmoid_binary_cross_entropy(present, labels.present))
                 + sum(entropy(logits, want) for logits, want in zip(cells, wanted)))
        right = jnp.stack([jnp.argmax(logits, -1) == want for logits, want in zip(cells, wanted)]).all(0)
        counted = (jnp.argmax(count, -1) == labels.count).all(-1)
        return total, {"cells": jnp.mean(right), "counts": jnp.mean(counted),
                       "background": jnp.mean(jnp.argmax(background, -1) == labels.background)}
    return loss


def make_examples(config: EncoderConfig, transform: ImageTransform, patch: int) -> tuple[np.ndarray, Labels]:
    """Patches uint8 [N V P] and labels of training scenes that no data set holds."""
    scenes, images = [], []
    for index in range(config.num_images):
        rng = generator(config.seed, "encoder", index)
        scenes.append(sample_scene(rng, sample_request(rng, split="train"), split="train"))
        images.append(resize(shown(rng, scenes[-1], config.side), transform))
    return np.stack([patchify(image, patch) for image in images]), label(scenes, side=len(images[0]) // patch)


def train_encoder(model: ModelConfig, config: EncoderConfig, transform: ImageTransform,
                  folder: pathlib.Path) -> Params:
    """The averaged parameters of `vit` and `connector`, as they stand in IRG; resumes from `folder`."""
    patches, labels = make_examples(config, transform, model.vit.patch_size)
    side = round(patches.shape[1]**0.5)
    examiner = Functional(lambda rngs: Examiner(model, rngs=rngs))
    position = grid_position(side, side, model.vit_max_num_patch_per_side)

    def draw_batch(index: int) -> tuple[np.ndarray, Labels]:
        rows = default_rng((config.seed, index)).integers(len(patches), size=config.batch_size)
        return patches[rows], Labels(*(values[rows] for values in labels))
    loss = make_loss(examiner, position, width=model.llm.hidden_size, noise=config.noise)
    params = fit(loss, lambda: examiner.init(config.seed), draw_batch, config, folder)
    return {name: params[name] for name in ("vit", "connector")}
