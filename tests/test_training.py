"""The step: same result on any mesh and any accumulation; padding, EMA and frozen parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from data_cases import FakeTokenizer, data_config
from data_pipelines.packing import assemble
from data_pipelines.samples import Text, VAEImage, ViTImage
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.training.losses import LossConfig, count_totals, make_flow, mean_losses
from irg_jax.training.optimizer import OptimizerConfig, make_optimizer, select, trainable_mask
from irg_jax.training.placement import place
from irg_jax.training.state import create_state
from irg_jax.training.step import StepConfig, make_gradient, make_step
from irg_jax.training.update import make_update

VOCAB = 910
MODEL = ModelConfig(
    LLMConfig(VOCAB, 32, 64, 2, 4, 2), ViTConfig(32, 48, 2, 2),
    VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=2), max_latent_size=8,
    vit_max_num_patch_per_side=8)
NETWORK = Functional(lambda rngs: IRG(MODEL, rngs=rngs))
VAE = Functional(lambda rngs: make_autoencoder(MODEL, rngs=rngs))
# A key bias has no true gradient; a large eps keeps Adam from blowing its rounding noise up to a full step.
CONFIG = StepConfig(LossConfig(vae_batch=2), OptimizerConfig(learning_rate=1e-3, eps=1e-4), 10, 0, canvas=4,
                    remat="none")


def make_batch(num_packs: int, seed: int = 0):
    """Packs of random samples that use all three streams, with padding."""
    rng = np.random.default_rng(seed)
    config = data_config(text_tokens=96, vit_tokens=16, latent_tokens=24, images=3)
    image = lambda side: rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    text = lambda loss: Text(rng.integers(0, 256, rng.integers(1, 9)).tolist(), loss)
    def sample():
        return [text(False), VAEImage(image(32), False), ViTImage(image(28)), text(True),
                VAEImage(image(48), True, float(rng.normal()))]
    packs = [assemble([sample(), [text(False), text(True)]], config=config, tokenizer=FakeTokenizer())
             for _ in range(num_packs)]
    return jax.tree.map(lambda *x: np.stack(x), *packs)


def run(mesh_config: MeshConfig, devices: int, config: StepConfig, steps: int = 2):
    """Losses, parameters and the state's shardings after some steps on a mesh."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    where = place(NETWORK, VAE, optimizer, mesh)
    params = jax.device_put(NETWORK.init(0), where.state.params)
    state = jax.jit(lambda p: create_state(p, optimizer), out_shardings=where.state)(params)
    vae = jax.device_put(VAE.init(1), where.vae)
    step = jax.jit(make_step(NETWORK, VAE, config), out_shardings=(where.state, where.scalar))
    losses = []
    for index in range(steps):
        batch = jax.device_put(make_batch(4, index), where.batch)
        with jax.set_mesh(mesh):
            state, metrics = step(state, vae, batch)
        losses.append([float(metrics[name]) for name in ("ce", "mse", "grad_norm")])
    return np.array(losses), state


@pytest.fixture(scope="module")
def single():
    return run(MeshConfig(), 1, CONFIG)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_leaves_all_but_its_number(bad):
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.total_steps)
    step = jax.jit(make_step(NETWORK, VAE, CONFIG))
    vae, batch = VAE.init(1), make_batch(2, 0)
    state, metrics = step(create_state(NETWORK.init(0), optimizer), vae, batch)
    assert metrics["finite"]
    after, metrics = step(state, vae, batch._replace(text_weight=np.where(batch.text_weight > 0, bad, 0)))
    assert not metrics["finite"] and after.step == state.step + 1
    for part in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))
    sound, metrics = step(after, vae, batch)     # and goes on from there
    assert metrics["finite"] and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sound))


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2),
                                  pytest.param(MeshConfig(fsdp=2, context=2), marks=pytest.mark.slow),
                                  pytest.param(MeshConfig(data=2, fsdp=2), marks=pytest.mark.slow),
                                  pytest.param(MeshConfig(fsdp=1, context=4), marks=pytest.mark.slow)])
def test_any_mesh_gives_the_same_steps(single, mesh):
    losses, state = run(mesh, 4, CONFIG)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(single[1].params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
def test_moments_of_eight_bits_are_the_same_on_any_mesh_and_near_the_whole_ones(single):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, moments="int8"))
    alone, _ = run(MeshConfig(), 1, config)
    split, state = run(MeshConfig(fsdp=2, tensor=2), 4, config)
    np.testing.assert_allclose(split, alone, rtol=1e-4)
    np.testing.assert_allclose(alone, single[0], rtol=0.02)
    adam = next(s for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    kernel = lambda tree: tree["decoder"]["layers"]["gen"]["gate"]["kernel"]
    assert kernel(adam.mu).dtype == jnp.int8 and kernel(adam.nu).code.dtype == jnp.uint8
    split_axes = P(None, ("fsdp", "context"), ("tensor",))
    assert kernel(adam.mu).sharding.spec == kernel(adam.nu).code.sharding.spec == split_axes
    assert kernel(adam.nu).rows.sharding.spec[1:2] == (("fsdp", "context"),)


def test_parameters_and_moments_are_sharded_as_the_table_says():
    _, state = run(MeshConfig(fsdp=2, tensor=2), 4, CONFIG, steps=1)
    adam = next(s for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        assert tree["decoder"]["layers"]["gen"]["gate"]["kernel"].sharding.spec == P(None, ("fsdp", "context"),
                                                                                   ("tensor",))
        assert tree["decoder"]["norm"]["scale"].sharding.spec in (P(), P(None))


@pytest.mark.parametrize("field", [{"accumulate": 4}, {"remat": "attention"},
                                   pytest.param({"remat": "full"}, marks=pytest.mark.slow)])
def test_accumulation_and_remat_change_nothing(single, field):
    losses, _ = run(MeshConfig(), 1, dataclasses.replace(CONFIG, **field))
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)


def test_divisors_are_of_the_global_batch():
    """Packs with different numbers of loss tokens: the mean is over tokens, not over packs."""
    batch = make_batch(3)
    rng = np.random.default_rng(0)
    ce, error = rng.random(batch.text_weight.shape), rng.random((*batch.latent_weight.shape, 5))
    got = mean_losses(jnp.asarray(ce), jnp.asarray(error), batch, count_totals(batch))
    np.testing.assert_allclose(got[0], ce[batch.text_weight > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(got[1], error.mean(-1)[batch.latent_weight > 0].mean(), rtol=1e-5)


def test_no_loss_tokens_give_zero_and_no_nan():
    batch = make_batch(1)
    empty = batch._replace(text_weight=0 * batch.text_weight, latent_weight=0 * batch.latent_weight)
    latent = jnp.zeros((*batch.latent_image.shape, MODEL.latent_channels))
    flow = make_flow(empty, latent, latent, 1.0)
    losses, grads = jax.jit(make_gradient(NETWORK, CONFIG))(NETWORK.init(0), empty, flow)
    assert losses[:2] == (0.0, 0.0)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_padding_tokens_change_nothing():
    """What stands in padding slots reaches no loss and no gradient."""
    batch = make_batch(2)
    rng = np.random.default_rng(1)
    def fill(x, rows, value):
        padding = (rows.last < 0).reshape(rows.last.shape + (1,) * (x.ndim - 2))
        return np.where(padding, value, x)
    dirty = batch._replace(
        text_ids=fill(batch.text_ids, batch.text_rows, 7),
        vit_patches=fill(batch.vit_patches, batch.vit_rows, 200).astype(np.uint8))
    shape = (*batch.latent_image.shape, MODEL.latent_channels)
    noise, latent = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape))
    gradient = jax.jit(make_gradient(NETWORK, CONFIG))
    results = [gradient(NETWORK.init(0), b, make_flow(b, latent, noise, 1.0)) for b in (batch, dirty)]
    for one, other in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stream_of_no_tokens_is_like_one_of_padding(accumulate):
    """`vit_tokens` may be 0, where no picture is looked at."""
    config = data_config(text_tokens=24, vit_tokens=16, latent_tokens=24, images=3)
    rng = np.random.default_rng(0)
    image = VAEImage(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), True, 0.3)
    packs = [assemble([[Text([5, 6, 7], True), image]], config=dataclasses.replace(config, vit_tokens=tokens),
                      tokenizer=FakeTokenizer()) for tokens in (16, 0)]
    gradient = jax.jit(make_gradient(NETWORK, dataclasses.replace(CONFIG, accumulate=accumulate)))
    results = []
    for pack in packs:
        batch = jax.tree.map(lambda x: np.stack([x, x]), pack)
        latent = jnp.ones((*batch.latent_image.shape, MODEL.latent_channels))
        results.append(gradient(NETWORK.init(0), batch, make_flow(batch, 0.5 * latent, latent, 1.0)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)   # keys are summed in another order


@pytest.mark.parametrize("copies", [True, False])
def test_frozen_parameters_stay_and_ema_follows_its_rule(copies):
    config = OptimizerConfig(learning_rate=1e-2, frozen=("vit", "embed"), ema_decay=0.9,
                             ema_copies_frozen=copies)
    optimizer = make_optimizer(config, 10)
    start = NETWORK.init(0)
    old = jax.tree.map(jnp.ones_like, start)
    state = dataclasses.replace(create_state(start, optimizer), ema=old)
    new, _ = jax.jit(make_update(NETWORK, config, optimizer))(state, select(old, config.frozen), 0.5, True)
    for name, was in start.items():
        is_frozen = name in config.frozen
        trees = (new.params[name], was, new.ema[name])
        for leaf, before, ema in zip(*map(jax.tree.leaves, trees), strict=True):
            assert np.array_equal(leaf, before) == is_frozen
            expected = (leaf if copies else 1.0) if is_frozen else 0.9 + 0.1 * np.asarray(leaf, np.float64)
            np.testing.assert_allclose(ema, np.broadcast_to(expected, leaf.shape), rtol=1e-6)


def test_a_frozen_prefix_that_names_nothing_is_refused():
    with pytest.raises(ValueError, match="'vitt'"):
        trainable_mask(NETWORK.shapes, ("vitt",))


def test_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs 6 devices"):
        make_mesh(MeshConfig(data=2, fsdp=3))




@pytest.mark.parametrize("fields, message", [
    ({"clip": 0.0}, "clip is 0.0; it must be positive"), ({"clip": float("nan")}, "clip is nan"),
    ({"ema_decay": 1.5}, "ema_decay is 1.5"), ({"warmup_steps": -1}, "warmup_steps is -1"),
    ({"schedule": "step"}, "schedule is 'step'"), ({"final_learning_rate": 1.0}, "final_learning_rate is 1.0")])
def test_values_that_would_train_nothing_or_the_wrong_way_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
