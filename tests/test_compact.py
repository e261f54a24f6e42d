"""Moments in fewer bytes: what they round, what that does to updates, and that nothing explodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.training.compact import (
    OCTAVES,
    ROOT_TOP,
    Bytes,
    Roots,
    decode_roots,
    decode_shares,
    encode_roots,
    encode_shares,
    make_packing,
    mix,
    peaks,
    round_half,
    scale_by_compact_adam,
    throw,
)

B1, B2, EPS = 0.9, 0.95, 1e-15
STEP = 2 ** (OCTAVES / ROOT_TOP) - 1     # of a code of r
COMPACT = ("bfloat16", "int8")
SHAPE = (32, 64)


def make(moments: str):
    return scale_by_compact_adam(B1, B2, EPS, moments)


@functools.cache
def runner(moments: str):
    """[steps, ...] gradients -> [steps, ...] updates, and m and r as they are stored after the last."""
    adam = make(moments)
    def run(grads):
        state, updates = jax.lax.scan(lambda state, g: adam.update(g, state)[::-1], adam.init(grads[0]), grads)
        return updates, make_packing(B1, B2, moments).unpack(state.mu, state.nu)
    return jax.jit(run)


def exact(grads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Updates of Adam in float64, and its last m and r."""
    m = v = np.zeros(grads.shape[1:])
    updates = []
    for step, g in enumerate(grads.astype(np.float64), 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        updates.append(m / (1 - B1**step) / (np.sqrt(v / (1 - B2**step)) + EPS))
    return np.stack(updates), m, np.sqrt(v)


def draw(kind: str, steps: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(steps, *SHAPE))
    return {
        "normal": lambda: normal,
        "drifting": lambda: normal + 0.5 * np.sin(np.arange(steps) / 30)[:, None, None],
        "sparse": lambda: normal * (rng.random(normal.shape) < 0.05),
        "heavy": lambda: rng.standard_t(1.5, normal.shape),
        "columns": lambda: normal * np.exp(4 * rng.normal(size=SHAPE[1])),    # as an output layer's tokens
        "rows": lambda: normal * np.exp(4 * rng.normal(size=(SHAPE[0], 1))),  # as an embedding's
    }[kind]().astype(np.float32)


# ---- codes --------------------------------------------------------------------------------------------------

def to_chance(fraction: float, shape: tuple[int, ...]) -> jax.Array:
    return jnp.full(shape, int(fraction * 2**32), jnp.uint32)


def back_and_forth(r: np.ndarray, chance: jax.Array) -> np.ndarray:
    rows, columns = peaks(jnp.asarray(r), -1), peaks(jnp.asarray(r), -2)
    return np.asarray(decode_roots(Roots(encode_roots(r, jnp.minimum(rows, columns), chance), rows, columns)))


normal_floats = functools.partial(st.floats, width=32, allow_subnormal=False)
magnitudes = hnp.arrays(np.float32, (3, 7), elements=normal_floats(0, 1))
fractions = st.floats(0, 1, exclude_max=True)


@settings(max_examples=60, deadline=None)
@given(magnitudes, st.floats(-28, 28), fractions)
def test_roots_come_back_within_a_step_and_never_below_the_smallest_code(r, exponent, fraction):
    r = np.float32(r * 10.0**exponent)
    back = back_and_forth(r, to_chance(fraction, r.shape))
    floor = np.minimum(r.max(-1, keepdims=True), r.max(-2, keepdims=True)) * 2.0**-OCTAVES
    inside = r >= floor
    assert (np.abs(back - r) <= (STEP + 1e-4) * r + 1e-37)[inside].all()
    np.testing.assert_allclose(back[~inside], floor[~inside], rtol=1e-5, atol=1e-37)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, 20, elements=normal_floats(-1, 1)), fractions)
def test_codes_are_monotone_and_shares_come_back(x, fraction):
    x = np.sort(x)
    chance = to_chance(fraction, x.shape)
    back = np.asarray(decode_shares(encode_shares(x, chance)))
    assert (np.abs(back - x) <= 2 * np.sqrt(np.abs(x)) / 127 + 1 / 127**2 + 1e-6).all()
    half = np.asarray(round_half(jnp.asarray(x), chance).astype(jnp.float32))
    assert (np.abs(half - x) <= 2.0**-7 * np.abs(x) + 1e-38).all()
    magnitude = np.sort(np.abs(x))
    roots = back_and_forth(magnitude, chance)
    for values in (back[x >= 0], half[x >= 0], roots):
        assert (np.diff(values) >= 0).all()


def test_rounding_is_right_on_average():
    chances = (jnp.arange(4096, dtype=jnp.uint32) << 20)[:, None]
    x = np.random.default_rng(0).uniform(0.01, 1, (1, 50)).astype(np.float32)
    mean = lambda decoded: np.asarray(decoded, np.float64).mean(0)
    many = jnp.broadcast_to(x, (4096, 50))
    np.testing.assert_allclose(mean(decode_shares(encode_shares(many, chances))), x[0], rtol=1e-3)
    np.testing.assert_allclose(mean(round_half(many, chances)), x[0], rtol=1e-5)
    one = many.at[:, 0].set(1.0).at[0].set(1.0)    # every row and column has a peak of 1
    back = mean(back_and_forth(one, chances) ** 2)
    np.testing.assert_allclose(back, mean(one**2), rtol=1e-3)


def test_chances_are_even_and_independent():
    seeds = [jnp.uint32(seed) for seed in range(16)]
    throws = np.stack([np.stack(throw((64, 64), mix(seed))) for seed in seeds]) / 2**32
    for chance in throws.reshape(-1, 64, 64):
        assert (np.abs(np.histogram(chance, 16, (0, 1))[0] - 256) < 5 * 16).all()
    alike = lambda x, y: abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) * np.sqrt(x.size)    # in deviations
    assert alike(throws[:, 0], throws[:, 1]) < 4
    for axis in (0, 2, 3):    # of neighbours: seeds, rows, columns
        x = np.moveaxis(throws, axis, 0)
        assert alike(x[1:], x[:-1]) < 4


# ---- against Adam -------------------------------------------------------------------------------------------

def test_float32_is_adam():
    grads = draw("normal", 20)
    mine, adam = make("float32"), optax.adam(1.0, B1, B2, EPS)
    state, expected = mine.init(grads[0]), adam.init(grads[0])
    for g in grads:
        update, state = mine.update(g, state)
        want, expected = adam.update(g, expected)
        np.testing.assert_array_equal(update, -want)


# Of the error of an update, which is of order 1: root mean square, and the largest of 400,000.
BOUNDS = {"bfloat16": (0.005, 0.04), "int8": (0.03, 0.25)}


@pytest.mark.parametrize("moments", COMPACT)
@pytest.mark.parametrize("kind", ["normal", "drifting", "sparse", "heavy", "columns", "rows"])
def test_updates_are_those_of_float64(moments, kind):
    grads = draw(kind)
    got, (m, r) = runner(moments)(grads)
    want, want_m, want_r = exact(grads)
    error = np.asarray(got) - want
    rms, largest = np.sqrt(np.mean(error**2)), np.abs(error).max()
    slope = (got * want).sum() / (want**2).sum()
    print(f"{moments} {kind}: rms {rms:.4f} of {np.sqrt(np.mean(want**2)):.2f} largest {largest:.3f} "
          f"slope - 1 {slope - 1:+.4f} size {np.abs(got).max():.2f} of {np.abs(want).max():.2f} "
          f"r bias {np.median(r / want_r) - 1:+.4f} v bias {np.mean((r / want_r)**2) - 1:+.4f} "
          f"r rms {np.std(np.log(r / want_r)):.3f}")
    assert rms < BOUNDS[moments][0] and largest < BOUNDS[moments][1] and abs(slope - 1) < 0.02


@pytest.mark.parametrize("moments", COMPACT)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-24, 1e-20, 1e-15, 1e-8, 1e3])
def test_no_gradient_is_too_small(moments, scale):
    grads = np.float32(draw("heavy", 100) * scale)
    grads[40:60] = 0
    got, want = np.asarray(runner(moments)(grads)[0]), exact(grads)[0]
    assert np.isfinite(got).all() and np.abs(got).max() <= 1.5 * np.abs(want).max()
    print(f"{moments} {scale}: {np.sqrt(np.mean((got - want)**2) / np.mean(want**2)):.4f}")
    assert np.sqrt(np.mean((got - want) ** 2)) < 2 * BOUNDS[moments][0] * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("moments", COMPACT)
def test_gradients_far_apart_in_one_row_give_smaller_updates_never_larger(moments):
    sizes = 10.0 ** -np.linspace(0, 34, SHAPE[1])
    sizes = np.random.default_rng(1).permuted(np.tile(sizes, (SHAPE[0], 1)), axis=1)
    grads = np.float32(draw("normal", 100) * sizes)
    got, want = np.asarray(runner(moments)(grads)[0]), exact(grads)[0]
    assert np.isfinite(got).all() and np.abs(got).max() <= 1.5 * np.abs(want).max()


@pytest.mark.parametrize("moments", COMPACT)
def test_zeros_give_zeros(moments):
    grads = np.zeros((5, *SHAPE), np.float32)
    updates, (m, r) = runner(moments)(grads)
    assert not updates.any() and not m.any() and not r.any()
    grads[:, :3] = 1                   # rows beside them change nothing
    updates, (m, r) = runner(moments)(grads)
    assert not updates[:, 3:].any() and not m[3:].any() and not r[3:].any()


@pytest.mark.parametrize("moments", COMPACT)
@pytest.mark.parametrize("decay", [0, 1e-3, 1e-2])
def test_constant_and_slowly_decaying_gradients_are_met(moments, decay):
    sizes = np.float32(np.random.default_rng(0).lognormal(size=SHAPE))
    grads = np.float32(np.exp(-decay * np.arange(400))[:, None, None] * sizes)
    updates, (m, r) = runner(moments)(grads)
    want, want_m, want_r = exact(grads)
    mean_m, mean_v = np.mean(m / want_m) - 1, np.mean((r / want_r) ** 2) - 1
    print(f"{moments} {decay}: m {mean_m:+.4f} +- {np.std(m / want_m):.4f} v {mean_v:+.4f} "
          f"+- {np.std((r / want_r)**2):.4f} update {np.mean(updates[-100:] / want[-100:]) - 1:+.4f}")
    assert abs(mean_m) < 0.01 and abs(mean_v) < 0.02
    assert abs(np.mean(updates[-100:] / want[-100:]) - 1) < 0.01


# ---- as a part of training ----------------------------------------------------------------------------------

def test_a_network_learns_as_well():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(256, 16)))
    y = jnp.float32(np.sin(x @ rng.normal(size=(16, 4))))
    start = {"in": rng.normal(size=(16, 64)) / 4, "bias": np.zeros(64), "out": rng.normal(size=(64, 4)) / 8}
    def loss_of(params, rows):
        return jnp.mean((jnp.tanh(x[rows] @ params["in"] + params["bias"]) @ params["out"] - y[rows]) ** 2)
    def train(moments):
        optimizer = optax.chain(make(moments), optax.scale(-3e-3))
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (64,), 0, 256)
            updates, state = optimizer.update(jax.grad(loss_of)(params, rows), state)
            return (optax.apply_updates(params, updates), state), None
        params = jax.tree.map(jnp.float32, start)
        keys = jax.random.split(jax.random.key(0), 600)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return loss_of(params, np.arange(256))
    losses = {moments: float(jax.jit(train, static_argnums=0)(moments)) for moments in ("float32", *COMPACT)}
    print(losses, float(loss_of(start, np.arange(256))))
    for moments in COMPACT:
        assert losses[moments] < 1.05 * losses["float32"]


@pytest.mark.parametrize("moments", COMPACT)
def test_any_shape_and_donation(moments):
    shapes = [(), (0,), (1,), (3,), (129,), (5, 1), (4, 3), (2, 127), (2, 128), (2, 129), (0, 3), (3, 0),
              (2, 3, 4)]
    params = {f"leaf{index}": jnp.ones(shape) for index, shape in enumerate(shapes)}
    adam = make(moments)
    state = jax.jit(adam.init)(params)
    step = jax.jit(lambda grads, state: adam.update(grads, state), donate_argnums=1)
    for index in range(3):
        before, (updates, state) = state, step(jax.tree.map(lambda x: x * (index + 1), params), state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.size)
    assert state.count == 3 and jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(params))
    for leaf in jax.tree.leaves(updates):      # of gradients 1, 2, 3
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, exact(np.float32([1, 2, 3]))[0][-1], rtol=0.06)
    empty = adam.update({}, adam.init({}))
    assert empty[0] == {} and empty[1].mu == {}


@pytest.mark.parametrize("moments,bytes_each", [("float32", 8), ("bfloat16", 4), ("int8", 2.002)])
def test_bytes(moments, bytes_each):
    state = jax.eval_shape(make(moments).init, {"kernel": jax.ShapeDtypeStruct((3584, 18944), jnp.float32)})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.mu, state.nu)))
    assert size <= bytes_each * 3584 * 18944


@pytest.mark.parametrize("moments", COMPACT)
def test_any_mesh_and_only_what_trains(moments):
    """Moments under the masks of `optax.partition`, split over eight devices: the same to the last bit."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.ones((2, 16, 24)), "frozen": jnp.ones((3, 4))}
    optimizer = optax.partition({"train": make(moments), "frozen": optax.set_to_zero()},
                                {"kernel": "train", "frozen": "frozen"})
    spec = NamedSharding(make_mesh(MeshConfig(fsdp=2, tensor=4)), P(None, "fsdp", "tensor"))
    one = many = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for _ in range(4):
        grads = {"kernel": rng.normal(size=(2, 16, 24)).astype(np.float32),
                 "frozen": np.ones((3, 4), np.float32)}
        update, one = step(grads, one)
        split, many = step(grads | {"kernel": jax.device_put(grads["kernel"], spec)}, many)
        jax.tree.map(np.testing.assert_array_equal, (update, one), jax.device_get((split, many)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="use 'float32', 'bfloat16' or 'int8'"):
        make("int4")
    with pytest.raises(ValueError, match="b1\\^2 < b2"):
        scale_by_compact_adam(0.9, 0.8, EPS, "int8")
    assert isinstance(make_packing(0.9, 0.999, "int8"), Bytes)
