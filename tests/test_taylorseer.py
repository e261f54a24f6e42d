"""Steps that extrapolate against polynomials, and drawing against a loop that fits them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irg_jax.sampling import cache
from irg_jax.sampling.config import FlowConfig
from irg_jax.sampling.flow import draw_latent, timesteps
from irg_jax.sampling.taylorseer import plan_steps
from sampling_cases import compiled, distance
from test_sampling_flow import BRACKETS, NOISE, POSITION, branches, model, numpy_guide  # noqa: F401


@given(first=st.integers(1, 6), interval=st.integers(1, 5), order=st.integers(0, 3), count=st.integers(2, 40),
       shift=st.floats(1, 4), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_polynomials_are_continued_from_the_computed_steps(first, interval, order, count, shift, seed):
    config = FlowConfig(num_timesteps=count, timestep_shift=shift, taylorseer_first=first,
                        taylorseer_interval=interval, taylorseer_order=order)
    times = timesteps(config)
    plan = plan_steps(times, [2] * (count - 1), config)
    computed = np.flatnonzero(plan.is_computed)
    expected = [step for step in range(count - 1) if step < first or (step - first + 1) % interval == 0]
    assert computed.tolist() == expected
    factors = np.random.default_rng(seed).standard_normal(order + 1)
    for step in np.flatnonzero(~plan.is_computed):
        last = [known for known in computed if known < step][::-1][:order + 1]
        polynomial = np.polynomial.Polynomial(factors[:len(last)])
        found = plan.weights[step, :len(last)] @ polynomial(times[last])
        tolerance = 1e-4 * float(np.abs(plan.weights[step]).sum())
        assert found == pytest.approx(float(polynomial(times[step])), abs=tolerance)
        assert not plan.weights[step, len(last):].any()


def test_new_branches_begin_anew_and_fewer_go_on():
    config = FlowConfig(num_timesteps=13, taylorseer_first=2, taylorseer_interval=3, taylorseer_order=2)
    plan = plan_steps(timesteps(config), [1] * 4 + [3] * 5 + [1] * 3, config)
    assert np.flatnonzero(plan.is_computed).tolist() == [0, 1, 4, 5, 8, 11]
    assert (plan.weights[6] != 0).tolist() == [True, True, False]   # nothing from before the branches came
    assert (plan.weights[9] != 0).all()


@pytest.mark.parametrize("fields", [
    {}, {"cfg_interval": (0.3, 0.9), "taylorseer_first": 2}, {"taylorseer_order": 2, "solver": "adams"},
    {"taylorseer_order": 0, "taylorseer_interval": 4}, {"cfg_text_scale": 1.0}], ids=str)
def test_drawing_equals_a_loop_that_fits_a_polynomial(model, branches, fields):  # noqa: F811
    """Every branch by itself, by numpy's fit in float64 through the last points."""
    config = FlowConfig(**{"num_timesteps": 15, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0),
                           "taylorseer_first": 3, "enable_taylorseer": True} | fields)
    text = cache.fork(branches.main, branches.cfg_text)
    contexts, times, latent = (branches.main, text, branches.cfg_img), timesteps(config), NOISE
    low, high = config.cfg_interval
    guided = (times[:-1] > low) & (times[:-1] <= high) & (config.cfg_text_scale > 1)
    computed, last, velocity = [], None, None
    for step, t in enumerate(times[:-1]):
        seen = contexts if guided[step] else contexts[:1]
        if step and guided[step] and not guided[step - 1]:
            computed = []
        if len(computed) < config.taylorseer_first or step - computed[-1][0] >= config.taylorseer_interval:
            added = [compiled(cache.predict_added)([(one.kv, [one.view])], BRACKETS, latent, t, POSITION)
                     for one in seen]
            computed.append((step, added))
        else:
            points = computed[-config.taylorseer_order - 1:]
            added = [fit([times[at] for at, _ in points], [values[i] for _, values in points], t)
                     for i in range(len(seen))]
        each = [np.asarray(compiled(cache.velocities_with)(one, latent, t, POSITION)[0]) for one in added]
        last, velocity = velocity, each[0]
        if guided[step]:
            velocity = np.stack([numpy_guide(*one, config) for one in zip(*each)])
        ahead = velocity
        if config.solver == "adams" and step and guided[step] == guided[step - 1]:
            ahead = velocity + (velocity - last) * (t - times[step + 1]) / (times[step - 1] - t) / 2
        latent = (latent - ahead * (t - times[step + 1])).astype(np.float32)
    assert len(computed) < config.num_timesteps - 4
    drawn = jax.jit(lambda noise: draw_latent(model, branches, noise, POSITION, BRACKETS, config))(NOISE)
    assert distance(drawn, latent) < 1e-4


def fit(times: list[float], values: list[np.ndarray], t: float) -> np.ndarray:
    flat = np.stack(values).reshape(len(times), -1).astype(np.float64)
    powers = np.polynomial.polynomial.polyfit(np.array(times, np.float64), flat, len(times) - 1)
    return np.polynomial.polynomial.polyval(t, powers).reshape(values[0].shape).astype(np.float32)


def test_if_every_step_is_computed_nothing_changes(model, branches):  # noqa: F811
    exact = FlowConfig(num_timesteps=6, cfg_img_scale=2.0)
    every = FlowConfig(num_timesteps=6, cfg_img_scale=2.0, enable_taylorseer=True, taylorseer_interval=1)
    draw = lambda config: jax.jit(
        lambda noise: draw_latent(model, branches, noise, POSITION, BRACKETS, config))(NOISE)
    drawn = draw(exact), draw(every)
    assert distance(*drawn) < 1e-5
