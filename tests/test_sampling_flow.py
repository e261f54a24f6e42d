"""The image sampler against loops and formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.images import grid_position
from irg_jax.sampling import cache, flow
from irg_jax.sampling.config import FlowConfig
from irg_jax.sampling.flow import Branches, draw_latent, guide, timesteps
from sampling_cases import CONFIG, append, bound, distance, predict

POSITION = grid_position(2, 3, CONFIG.max_latent_size)
BRACKETS = np.array([1, 2], np.int32)
NOISE = np.random.default_rng(0).standard_normal((2, 6, CONFIG.latent_channels)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return bound()


@pytest.fixture(scope="module")
def branches(model):
    def read(context, *ids):
        return append(context, np.array([ids, ids[::-1]], np.int32),
                      np.array([len(ids), len(ids) - 1], np.int32))[0]
    empty = cache.make_empty(CONFIG, 2, 8, jnp.float32)
    early = read(empty, 5, 6)
    return Branches(read(cache.enlarge(early, 16), 7, 8, 11), early.view, read(empty, 9, 10))


def numpy_guide(main, text, image, config: FlowConfig) -> np.ndarray:
    """One image [G, C], token by token, as DESIGN.md section 5 says it."""
    length = lambda x: np.sqrt((x.astype(np.float64) ** 2).sum())
    scale = lambda guided, plain: np.clip(length(plain) / (length(guided) + 1e-8),
                                          config.cfg_renorm_min, 1)
    guided = text + config.cfg_text_scale * (main - text)
    if config.cfg_renorm_type == "text_channel":
        guided = np.stack([token * scale(token, plain) for token, plain in zip(guided, main)])
        return guided if image is None else image + config.cfg_img_scale * (guided - image)
    if image is not None:
        guided = image + config.cfg_img_scale * (guided - image)
    if config.cfg_renorm_type == "global":
        return guided * scale(guided, main)
    return np.stack([token * scale(token, plain) for token, plain in zip(guided, main)])


@given(seed=st.integers(0, 2**32 - 1), scales=st.tuples(st.floats(1.1, 8), st.floats(1.0, 4)),
       kind=st.sampled_from(["global", "channel", "text_channel"]), least=st.floats(0, 1),
       has_image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_guidance_is_the_formula(seed, scales, kind, least, has_image):
    config = FlowConfig(cfg_text_scale=scales[0], cfg_img_scale=scales[1], cfg_renorm_type=kind,
                        cfg_renorm_min=least)
    velocities = np.random.default_rng(seed).standard_normal((3, 2, 4, 5)).astype(np.float32)
    main, text, image = velocities
    given_ = [main, text, image] if has_image else [main, text]
    actual = guide([jnp.asarray(velocity) for velocity in given_], config)
    for i in range(2):  # the norm of `global` is an image's, not the batch's
        expected = numpy_guide(main[i], text[i], image[i] if has_image else None, config)
        np.testing.assert_allclose(actual[i], expected, rtol=2e-4, atol=2e-5)


@given(count=st.integers(2, 60), shift=st.floats(0.5, 6))
@settings(max_examples=30, deadline=None)
def test_timesteps_fall_from_one_to_zero_by_the_shift(count, shift):
    t = timesteps(FlowConfig(num_timesteps=count, timestep_shift=shift))
    assert t[0] == 1 and t[-1] == 0 and (np.diff(t) < 0).all()
    plain = 1 - np.arange(count) / (count - 1)
    np.testing.assert_allclose(t, shift * plain / (1 + (shift - 1) * plain), atol=1e-6)


@pytest.mark.parametrize("config", [
    FlowConfig(num_timesteps=8),
    FlowConfig(num_timesteps=5, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0),
               cfg_renorm_type="text_channel"),
    FlowConfig(num_timesteps=6, cfg_img_scale=1.5, cfg_interval=(0.3, 0.9),
               cfg_renorm_type="channel", cfg_renorm_min=0.5),
    FlowConfig(num_timesteps=4, cfg_text_scale=1.0, cfg_img_scale=3.0),
], ids=["text", "both", "middle", "none"])
def test_drawing_equals_a_plain_loop_over_the_model(model, branches, config):
    """Every branch of every step by itself, whether or not the step is guided."""
    latent, times = NOISE.astype(np.float32), timesteps(config)
    for t, following in zip(times[:-1], times[1:]):
        text = cache.fork(branches.main, branches.cfg_text)
        main, text, image = (np.asarray(predict(context, BRACKETS, latent, t, POSITION))
                             for context in (branches.main, text, branches.cfg_img))
        low, high = config.cfg_interval
        velocity = main
        if low < t <= high and config.cfg_text_scale > 1:
            image = image if config.cfg_img_scale > 1 else [None, None]
            velocity = np.stack([numpy_guide(*each, config) for each in zip(main, text, image)])
        latent = (latent - velocity * (t - following)).astype(np.float32)
    actual = jax.jit(lambda noise: draw_latent(
        model, branches, noise, jnp.asarray(POSITION), jnp.asarray(BRACKETS), config))(NOISE)
    assert distance(actual, latent) < 1e-5


def test_a_straight_flow_is_followed_to_its_end(monkeypatch):
    """With the exact velocity of one image the Euler steps end on that image, however few."""
    target = NOISE[::-1] * 2
    exact = lambda model, seen, brackets, latent, t, position: [(latent - target) / t]
    monkeypatch.setattr(flow, "predict_velocities", exact)
    config = FlowConfig(num_timesteps=4, cfg_text_scale=1.0)
    drawn = draw_latent(None, Branches(cache.Context(None, None), None), NOISE, POSITION, BRACKETS, config)
    assert distance(drawn, target) < 1e-5


def test_adams_converges_by_the_square_of_the_steps(monkeypatch):
    """dx/dt = x from 1 to 0 ends on x / e; twice the steps leave half Euler's error and a quarter of Adams'."""
    monkeypatch.setattr(flow, "predict_velocities", lambda model, seen, brackets, latent, t, position: [latent])

    def error(solver: str, steps: int) -> float:
        config = FlowConfig(num_timesteps=steps + 1, timestep_shift=1.5, cfg_text_scale=1.0, solver=solver)
        return distance(draw_latent(None, Branches(cache.Context(None, None), None), NOISE, POSITION, BRACKETS,
                                    config), NOISE / np.e)
    for solver, factor in (("euler", 2), ("adams", 4)):
        assert error(solver, 10) / error(solver, 20) == pytest.approx(factor, rel=0.15)
    assert error("adams", 10) < error("euler", 10) / 10


def test_adams_starts_anew_where_guidance_ends():
    config = FlowConfig(num_timesteps=9, cfg_interval=(0.5, 0.95))
    times = timesteps(config)
    is_guided = (times[:-1] > 0.5) & (times[:-1] <= 0.95)
    weights, length = flow._weights(times, is_guided), -np.diff(times)
    leaps = [0, *(np.flatnonzero(is_guided[1:] != is_guided[:-1]) + 1)]
    assert len(leaps) == 3 and (weights[leaps] == 0).all()
    others = np.setdiff1d(np.arange(8), leaps)
    np.testing.assert_allclose(weights[others], length[others] / length[others - 1] / 2, rtol=1e-6)


def test_only_the_branches_that_a_step_needs_are_run(model, monkeypatch, branches):
    seen = []

    names = {id(branches.main.view): "main", id(branches.cfg_text): "text", id(branches.cfg_img.view): "img",
             id(branches.main.kv): "main", id(branches.cfg_img.kv): "img"}

    def record(model, caches, brackets, latent, t, position):
        views = [view for _, views in caches for view in views]
        seen.append(" ".join(names[id(view)] for view in views))
        assert [names[id(kv)] for kv, _ in caches] == ["main", "img"][:len(caches)]
        return [latent] * len(views)
    monkeypatch.setattr(flow, "predict_velocities", record)
    draw = lambda branches=branches, **fields: draw_latent(model, branches, NOISE, POSITION, BRACKETS,
                                                           FlowConfig(num_timesteps=9, **fields))
    for fields, expected in (({}, ["main text", "main"]), ({"cfg_img_scale": 2.0}, ["main text img", "main"]),
                             ({"cfg_text_scale": 1.0, "cfg_img_scale": 2.0}, ["main"]),
                             ({"cfg_interval": (0.0, 1.0)}, ["main text"]),
                             ({"cfg_interval": (0.5, 0.95)}, ["main", "main text", "main"])):
        seen.clear()
        draw(**fields)
        assert seen == expected, fields
    seen.clear()   # no image was seen: a third view of one cache
    draw(branches._replace(cfg_img=branches.cfg_text), cfg_img_scale=2.0)
    assert seen == ["main text text", "main"]
