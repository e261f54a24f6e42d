"""LoRA: gradients against those of whole kernels, and a run that holds, averages and hands on what it must."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax.checkpoints.model import load_model
from irg_jax.config import Phase
from irg_jax.models.functional import Functional
from irg_jax.models.groups import group_of, keep, paths_of, replace
from irg_jax.models.irg import IRG
from irg_jax.models.lora import LoraConfig, adapt, add_shapes, is_adapter, merge, read_lora
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.training.loop import train
from irg_jax.training.losses import make_flow
from irg_jax.training.optimizer import OptimizerConfig
from irg_jax.training.step import make_gradient
from test_loop import base, config, metrics, signal_after  # noqa: F401 (a fixture)
from test_phases import restored
from test_training import CONFIG, MODEL, NETWORK, make_batch

LORA = LoraConfig(("und", "gen", "vit", "latent"), rank=4, alpha=6.0)
ADAPTED = Functional(lambda rngs: adapt(IRG(MODEL, rngs=rngs), LORA, rngs=rngs))


def adapters_of(tree):
    return keep(tree, [is_adapter(path) for path in paths_of(tree)])


def flatten(tree):
    return dict(zip(paths_of(tree), jax.tree.leaves(tree), strict=True))


@pytest.fixture(scope="module")
def gradients():
    """Of adapters that are not zero, and of the merged network's kernels; and the parameters."""
    params = ADAPTED.init(0)
    draw = lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    noisy = jax.tree.map(draw, adapters_of(params))
    params = replace(params, noisy)
    batch, rng = make_batch(2), np.random.default_rng(0)
    shape = (*batch.latent_image.shape, MODEL.latent_channels)
    flow = make_flow(batch, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)), 1.0)
    thin = jax.jit(make_gradient(ADAPTED, CONFIG))(params, batch, flow)
    whole = jax.jit(make_gradient(NETWORK, CONFIG))(merge(params, LORA), batch, flow)
    return thin, whole, params


def test_an_adapted_network_is_the_merged_one_and_its_gradient_the_thin_part(gradients):
    (losses, grads), (wanted, whole), params = gradients
    np.testing.assert_allclose(losses.ce, wanted.ce, rtol=1e-5)
    np.testing.assert_allclose(losses.mse, wanted.mse, rtol=1e-5)
    grads, whole, params = map(flatten, (grads, whole, params))
    kernels = [path.removesuffix(".lora_a") for path in params if path.endswith(".lora_a")]
    assert len(kernels) == 2 * 7 + 6 + 1 + 2 + 2    # two experts, a ViT layer, its patches, latents, time
    for path in kernels:
        a, b = params[f"{path}.lora_a"], params[f"{path}.lora_b"]
        d_kernel = LORA.scale * np.asarray(whole[f"{path}.kernel"], np.float64)
        transposed = lambda x: np.asarray(x, np.float64).swapaxes(-1, -2)
        for name, truth in (("lora_a", d_kernel @ transposed(b)), ("lora_b", transposed(a) @ d_kernel)):
            np.testing.assert_allclose(grads[f"{path}.{name}"], truth, atol=2e-5 * max(1, np.abs(truth).max()))


def test_of_an_adapted_group_the_adapters_alone_have_a_gradient(gradients):
    (_, grads), _, params = gradients
    expected = {path for path in paths_of(params)
                if is_adapter(path) or group_of(path) in ("connector", "embeddings")}
    assert set(paths_of(grads)) == expected


def test_fresh_adapters_change_nothing():
    params = ADAPTED.init(3)
    jax.tree.map(np.testing.assert_array_equal, merge(params, LORA), NETWORK.init(3))
    assert all(np.abs(leaf).max() > 0 for path, leaf in flatten(params).items() if path.endswith("lora_a"))


def test_shapes_of_adapters_are_known_without_the_network():
    same = lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype)
    assert jax.tree.all(jax.tree.map(same, add_shapes(NETWORK.shapes, LORA), ADAPTED.shapes))
    assert add_shapes(NETWORK.shapes, LoraConfig()) == NETWORK.shapes


@pytest.mark.parametrize("fields, message", [
    ({"groups": ("gene",)}, "'gene'; use und, gen, vit, connector, latent"),
    ({"groups": ("embeddings",)}, "'embeddings'; use"),
    ({"rank": 0}, "lora.rank is 0"), ({"alpha": float("inf")}, "lora.alpha inf"),
])
def test_what_cannot_be_adapted_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_what_a_checkpoint_says_of_adapters_is_not_believed():
    plain = json.loads(json.dumps(dataclasses.asdict(LORA)))
    assert read_lora(plain) == LORA
    for wrong in (None, [], plain | {"more": 1}, plain | {"rank": "4"}, plain | {"groups": "gen"},
                  plain | {"groups": ["embed"]}, plain | {"rank": -1}, plain | {"alpha": float("nan")}):
        with pytest.raises(ValueError, match="lora"):
            read_lora(wrong)


FIELDS = {"lora": LoraConfig(("und", "gen"), rank=4), "frozen_dtype": "bfloat16", "total_steps": 4,
          "save_every": 1, "keep": 10, "optimizer": OptimizerConfig(
              learning_rate=1e-2, frozen=("vit", "connector", "embeddings", "latent"), ema_decay=0.5)}


@pytest.fixture(scope="module")
def run(base):  # noqa: F811
    assert train(config(base, stage="thin", **FIELDS), base / "run") == 4
    return base / "run" / "thin"


@pytest.mark.slow
def test_a_run_holds_moments_and_average_of_its_adapters_alone(run):
    first, last = restored(run, 1), restored(run, 4)
    params = last["state"]["params"]
    adapters = set(paths_of(adapters_of(params)))
    assert set(paths_of(last["ema"])) == adapters
    moments = [leaf for leaf in jax.tree.leaves(last["state"]["opt"]) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(last["ema"]))
    for path, leaf in flatten(params).items():
        assert leaf.dtype == ("float32" if path in adapters else jnp.bfloat16)
        stays = np.array_equal(leaf, flatten(first["state"]["params"])[path])
        assert stays == (path not in adapters), path


@pytest.mark.slow
def test_its_stage_is_the_merged_average(run, base):  # noqa: F811
    items = restored(run, 4)
    whole = replace(items["state"]["params"], items["ema"])
    begun = load_model(base / "base").params
    found = flatten(load_model(run).params)
    assert {path: leaf.shape for path, leaf in found.items()} == {
        path: leaf.shape for path, leaf in flatten(begun).items()}
    held = flatten(whole)
    for path, leaf in found.items():
        kernel = np.asarray(held[path], np.float64)
        if (a := path.replace("kernel", "lora_a")) in held and path.endswith("kernel"):
            product = np.asarray(held[a], np.float64) @ np.asarray(held[a.replace("_a", "_b")], np.float64)
            kernel = kernel + FIELDS["lora"].scale * product
            assert np.abs(product).max() > 1e-3
        np.testing.assert_allclose(leaf, kernel, atol=1e-6)
        np.testing.assert_allclose(flatten(begun)[path], held[path], atol=0.02)    # held in bfloat16


@pytest.mark.slow
def test_another_stage_goes_on_from_it(run, base):  # noqa: F811
    still = OptimizerConfig(learning_rate=0.0)
    train(config(base, stage="next", init_from="thin:ema", total_steps=1, optimizer=still), base / "run")
    wanted, found = load_model(run).params, load_model(base / "run" / "next").params
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, wanted)


@pytest.mark.slow
def test_it_resumes_bit_for_bit(run, base, monkeypatch):  # noqa: F811
    signal_after(1, monkeypatch)
    assert train(config(base, stage="thin", **FIELDS), base / "stopped") < 4
    monkeypatch.undo()
    assert train(config(base, stage="thin", **FIELDS), base / "stopped") == 4
    assert metrics(base / "stopped" / "thin") == metrics(run)


@pytest.mark.slow
def test_any_mesh_gives_the_same_steps(run, base):  # noqa: F811
    other = config(base, stage="thin", **(FIELDS | {"mesh": MeshConfig(fsdp=2, tensor=2, context=2)}))
    assert train(other, base / "other") == 4
    np.testing.assert_allclose(list(metrics(base / "other" / "thin").values()), list(metrics(run).values()),
                               rtol=2e-4)


@pytest.mark.slow
def test_what_begins_to_train_later_begins_to_be_averaged(base):  # noqa: F811
    fields = FIELDS | {"lora": LoraConfig(), "total_steps": 1,
                       "optimizer": dataclasses.replace(FIELDS["optimizer"], frozen=("vit", "gen"))}
    assert train(config(base, stage="thaws", **fields), base / "run") == 1
    folder = base / "run" / "thaws"
    assert {group_of(path) for path in paths_of(restored(folder, 1)["ema"])} == {
        "und", "connector", "embeddings", "latent"}
    fields |= {"total_steps": 3, "phases": (Phase("eyes", 2, frozen=("gen",)),)}
    assert train(config(base, stage="thaws", **fields), base / "run",
                 accepted=["total_steps", "phases"]) == 3
    one, three = restored(folder, 1), restored(folder, 3)
    assert "gen" not in three["ema"]["decoder"]["layers"]
    scale = lambda params: np.asarray(params["vit"]["post_norm"]["scale"], np.float32)
    assert three["ema"]["vit"]["post_norm"]["scale"].dtype == jnp.float32
    begun, ended = scale(one["state"]["params"]), scale(three["state"]["params"])
    assert not np.array_equal(begun, ended)
    np.testing.assert_allclose(scale(three["ema"]), 0.5 * begun + 0.5 * ended, rtol=1e-6)
