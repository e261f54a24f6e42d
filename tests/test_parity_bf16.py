"""The real precision policy (bfloat16 matmuls) beside the original's float32 values, and at extreme inputs.

bfloat16 rounds to 2^-9 of a value; what a whole network makes of that is measured here, and printed in the
table of `pytest tests/test_parity_bf16.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_cases import FakeTokenizer
from data_pipelines.packing import assemble
from data_pipelines.samples import Text, VAEImage, ViTImage
from irg_jax.training.losses import make_flow
from irg_jax.training.step import make_gradient
from parity_cases import ParityCase, first_turn, flow, numbers, relative, second_turn, trajectory_generator

LOSS, GRADIENT, LATENT = 1e-3, 0.03, 0.04


@pytest.fixture(scope="module")
def case(golden_dir) -> ParityCase:
    return ParityCase(golden_dir)


def test_losses_and_gradient(case):
    batch = case.pack()
    gradient = make_gradient(case.network, case.step_config(dtype="bfloat16"))
    (ce, mse, *_), grads = jax.jit(gradient)(case.params, batch, case.flow(batch))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    relative("bfloat16: loss, CE", ce, case.values["train_loss"]["ce"], LOSS)
    relative("bfloat16: loss, MSE", mse, case.values["train_loss"]["mse"], LOSS)
    torch = case.to_torch(grads)
    whole = lambda tensors: np.concatenate([np.ravel(tensors[name]) for name in sorted(torch)])
    expected = {name.removeprefix("grad/"): x for name, x in case.arrays.items() if name.startswith("grad/")}
    relative("bfloat16: gradient, all of it", whole(torch), whole(expected), GRADIENT)


def test_trajectory(case):
    """The latents of both turns, after the original's texts and its first image."""
    drawer = trajectory_generator(case, dtype="bfloat16")
    size = {"height": drawer.config.height, "width": drawer.config.width}
    first = first_turn(case, drawer)
    _, second = drawer.think(second_turn(case, drawer), [numbers(case.values["infer"]["think2"])])
    for turn, state in (("turn1", first), ("turn2", second)):
        latent = drawer.draw_latent(state, flow=flow(case.values["infer"][turn]), **size)
        assert latent.dtype == jnp.float32   # the Euler steps add up in it
        relative(f"bfloat16: latent of {turn}", latent[0],
                 case.arrays["infer.latent" + turn.removeprefix("turn")], LATENT)


def extreme_packs(case):
    patch, config = case.golden.data_config(**case.golden.room()).latent_patch, case.config
    side = config.vit.patch_size
    pixels = lambda *shape, value: np.full((*shape, 3), value, np.uint8)
    return {
        "nothing but padding": [],
        "a text of one token": [[Text([5], True)]],
        "a latent of one token": [[Text([5, 6], False), VAEImage(pixels(patch, patch, value=255), True, 30.0)]],
        "a timestep at the very end": [[VAEImage(pixels(patch, patch, value=0), True, -30.0)]],
        "an image of one patch": [[ViTImage(pixels(side, side, value=255)), Text([5], True)]],
        "the largest picture of either kind": [[
            ViTImage(pixels(*[config.vit_max_num_patch_per_side * side] * 2, value=0)),
            VAEImage(pixels(*[config.max_latent_size * patch] * 2, value=255), True, 0.0)]],
    }


@pytest.mark.parametrize("name", ["nothing but padding", "a text of one token", "a latent of one token",
                                  "a timestep at the very end", "an image of one patch",
                                  "the largest picture of either kind"])
def test_extreme_inputs_give_finite_losses_and_gradients(case, name):
    config = case.config
    budgets = {"text_tokens": 8, "vit_tokens": config.vit_max_num_patch_per_side**2,
               "latent_tokens": config.max_latent_size**2, "images": 2}
    pack = assemble(extreme_packs(case)[name], config=case.golden.data_config(**budgets),
                    tokenizer=FakeTokenizer(case.values["special_tokens"]))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], pack)
    shape = (*batch.latent_image.shape, config.latent_channels)
    clean, noise = (jax.random.normal(jax.random.key(seed), shape) * 10 for seed in (0, 1))
    gradient = make_gradient(case.network, case.step_config(dtype="bfloat16"))
    losses, grads = jax.jit(gradient)(case.params, batch, make_flow(batch, clean, noise, 4.0))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((losses, grads)))
    is_trained = name != "nothing but padding"
    assert (sum(map(float, losses[:2])) > 0) == is_trained
    assert (max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) > 0) == is_trained
