"""Kernels in eight bits: how far they are off, and that the network multiplies by what they say."""

import dataclasses

import jax
import numpy as np
import pytest

from irg_jax.models.groups import paths_of
from irg_jax.models.quantized import DTYPES, quantize_params
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.sampling import programs
from irg_jax.sampling.trajectory import Generator
from sampling_cases import CONFIG, SETTINGS, distance, make_model

PROMPTS, SEEDS = ["a red circle", "two stars"], [0, 1]


def rounded(dtype: str) -> dict:
    params = make_model().params
    return quantize_params(params, jax.tree.map(lambda x: jax.devices()[0], params), dtype)


def leaves(params: dict) -> dict[str, np.ndarray]:
    return dict(zip(paths_of(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def is_rounded(path: str) -> bool:
    return path.startswith("decoder.layers") and path.endswith(".kernel")


def dequantized(params: dict) -> dict:
    """Plain parameters with the kernels that the rounded ones stand for."""
    tree = {name: dequantized(child) if isinstance(child, dict) else child for name, child in params.items()
            if name != "kernel_scale"}
    if "kernel_scale" in params:
        scale = np.asarray(params["kernel_scale"])[..., None, :]
        tree["kernel"] = np.asarray(params["kernel"]).astype(np.float32) * scale
    return tree


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_column_is_rounded_by_its_own_scale_and_nothing_else_is(dtype):
    before, after = leaves(make_model().params), leaves(rounded(dtype))
    assert set(before) == {path for path in after if not path.endswith("kernel_scale")}
    for path, value in before.items():
        if not is_rounded(path):
            np.testing.assert_array_equal(after[path], value)
            continue
        assert str(after[path].dtype) == dtype
        scale = after[path + "_scale"][..., None, :]
        error = np.abs(after[path].astype(np.float32) * scale - value)
        # int8: half a step; float8 e4m3: half of 2^-3 of the value, and half its least step near zero.
        limit = 0.5 * scale if dtype == "int8" else np.maximum(2.0**-4 * np.abs(value), 2.0**-10 * scale)
        assert (error <= limit * 1.001).all() and error.max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_network_multiplies_by_the_rounded_kernels(dtype):
    """Texts and latents are those of a plain network with the kernels that the rounded ones stand for."""
    model = make_model()
    quantized = Generator(model, dataclasses.replace(SETTINGS, weights=dtype))
    plain = Generator(dataclasses.replace(model, params=dequantized(rounded(dtype))), SETTINGS)
    exact = Generator(model, SETTINGS)
    drawn = [draw(generator) for generator in (quantized, plain, exact)]
    assert drawn[0][0] == drawn[1][0]
    assert distance(drawn[0][1], drawn[1][1]) < 1e-4
    assert 1e-3 < distance(drawn[0][1], drawn[2][1]) < 0.3
    size = lambda generator: sum(leaf.nbytes for path, leaf in leaves(generator._weights.model).items()
                                 if is_rounded(path))
    assert size(quantized) == size(exact) / 4


def draw(generator: Generator) -> tuple[list[str], np.ndarray]:
    state = generator.begin(PROMPTS, seeds=SEEDS)
    texts = generator.decode(generator.write(state))
    _, state = generator.think(state, ["a", "b"])
    return texts, np.asarray(generator.draw_latent(state, height=32, width=48))


@pytest.mark.slow
def test_a_mesh_draws_the_same_with_them():
    config = dataclasses.replace(SETTINGS, weights="int8")
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    texts, alone = draw(Generator(make_model(), config))
    others, split = draw(Generator(make_model(), config, mesh=mesh))
    assert texts == others and distance(split, alone) < 1e-4
    shapes = programs.network(CONFIG, "int8").shapes["decoder"]["layers"]["gen"]["q"]
    assert (str(shapes["kernel"].dtype), str(shapes["kernel_scale"].dtype)) == ("int8", "float32")
