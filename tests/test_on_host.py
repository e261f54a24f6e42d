"""Moments and average in the host's memory: the same run as without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from PIL import Image

from irg_jax.config import Phase
from irg_jax.models.config import LLMConfig
from irg_jax.models.functional import Functional
from irg_jax.models.groups import paths_of
from irg_jax.models.irg import IRG
from irg_jax.models.lora import LoraConfig
from irg_jax.parallel.compiling import abstract, device_bytes
from irg_jax.parallel.sharding import HOST, MeshConfig, make_mesh
from irg_jax.parallel.topologies import compile_devices, find_topology
from irg_jax.training.loop import train
from irg_jax.training.optimizer import OptimizerConfig, make_optimizer, select
from irg_jax.training.placement import check_host_memory, place
from irg_jax.training.state import create_state
from irg_jax.training.trainer import Trainer
from irg_jax.training.update import make_update
from test_loop import base, config, metrics, signal_after  # noqa: F401 (a fixture)
from test_phases import restored
from test_training import MODEL, NETWORK, VAE

BOTH = ("moments", "ema")
FIELDS = {"total_steps": 4, "save_every": 1, "keep": 10, "mesh": MeshConfig(fsdp=4, context=2),
          # A key bias has no true gradient; a large eps keeps Adam from blowing its rounding noise up.
          "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, ema_decay=0.9, eps=1e-4)}
PHASES = (Phase("eyes and words stay", 2, frozen=("vit", "embeddings")), Phase("all again", 3))
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, frozen=("vit", "embed"), ema_decay=0.9)


def update_on(on_host, finite: bool, copies: bool = True):
    """State before and after a step with given gradients, over four devices."""
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    config = dataclasses.replace(OPTIMIZER, ema_copies_frozen=copies)
    optimizer = make_optimizer(config, 10)
    where = place(NETWORK, VAE, optimizer, mesh, on_host=on_host).state
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    state = create_state(jax.tree.map(draw, NETWORK.shapes), optimizer)
    random = jax.tree.map(lambda x: abs(draw(x)) if x.ndim else x + 3, (state.opt, state.ema))
    state = jax.device_put(dataclasses.replace(state, opt=random[0], ema=random[1]), where)
    grads = jax.tree.map(draw, state.opt[1].mu)
    update = make_update(NETWORK, config, optimizer)
    new, ratio = jax.jit(update, out_shardings=(where, None))(state, grads, optax.tree.norm(grads), finite)
    kinds = jax.tree.map(lambda x, sharding: x.sharding == sharding, new, where)
    assert jax.tree.all(kinds)
    return state, new, ratio


@pytest.mark.parametrize("on_host, copies", [(BOTH, True), (("moments",), True), (("ema",), False)])
def test_an_update_layer_by_layer_is_that_of_the_whole(on_host, copies):
    _, whole, ratio = update_on((), True, copies)
    _, found, other = update_on(on_host, True, copies)
    np.testing.assert_allclose(other, ratio, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), found, whole)
    assert int(found.opt[1].count) == int(whole.opt[1].count) == 4


def compile_update(layers: int):
    """The memory of a TPU, as its compiler plans it, and bytes that shall lie in the host's."""
    deep = dataclasses.replace(MODEL, llm=LLMConfig(64, 256, 1024, layers, 4, 2))
    network = Functional(lambda rngs: IRG(deep, rngs=rngs))
    mesh = make_mesh(MeshConfig(), compile_devices(find_topology("v6e-4")))
    optimizer = make_optimizer(OPTIMIZER, 10)
    where = place(network, VAE, optimizer, mesh, on_host=BOTH)
    create = lambda params: create_state(params, optimizer)
    state = abstract(jax.eval_shape(create, network.shapes), where.state)
    update = make_update(network, OPTIMIZER, optimizer)
    scalars = [jax.ShapeDtypeStruct((), dtype, sharding=where.scalar) for dtype in (jnp.float32, jnp.bool_)]
    traced = jax.jit(update, donate_argnums=0, out_shardings=(where.state, where.scalar)).trace(
        state, select(state.params, OPTIMIZER.frozen), *scalars)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    return memory, device_bytes(state, on_host=True)


def test_a_tpu_holds_a_layer_and_not_the_whole(libtpu):
    """By its compiler's word: with three times the layers in the host's memory, no more comes to the chip."""
    (few, low), (many, high) = map(compile_update, (8, 24))
    for memory, expected in ((few, low), (many, high)):
        assert memory.host_argument_size_in_bytes == pytest.approx(expected, rel=0.01)
        assert memory.host_temp_size_in_bytes < 1e5
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < 0.05 * (high - low)


@pytest.mark.parametrize("on_host", [(), BOTH])
def test_a_step_that_is_not_finite_changes_nothing(on_host):
    old, new, _ = update_on(on_host, False)
    assert int(new.step) == int(old.step) + 1
    for part in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(old, part))


@pytest.fixture(scope="module")
def plain(base):  # noqa: F811
    assert train(config(base, stage="plain", **FIELDS), base / "run") == 4
    return base / "run" / "plain"


class Drawn:
    """Keeps what it is given to draw with."""

    def check(self, model):
        pass

    def __call__(self, model, step):
        self.params = jax.tree.map(np.asarray, model.params)
        return Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def drawn():
    return Drawn()


@pytest.fixture(scope="module")
def run(base, drawn):  # noqa: F811
    """After every step arrays are asked where they lie."""
    seen, advance = [], Trainer.advance
    def look(self, batch):
        found = advance(self, batch)
        parts = (leaf for leaf in jax.tree.leaves(self.state.opt) if leaf.ndim), *map(
            jax.tree.leaves, (self.state.ema, self.state.params))
        seen.append([{leaf.sharding.memory_kind for leaf in part} for part in parts])
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", look)
        assert train(config(base, stage="host", on_host=BOTH, **FIELDS), base / "run", draw=drawn) == 4
    assert seen == [[{HOST}, {HOST}, {"device"}]] * 4
    return base / "run" / "host"


@pytest.mark.slow
def test_a_run_is_the_one_without(run, plain):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(list(metrics(run).values()), list(metrics(plain).values()), rtol=1e-5)
    for step in (1, 2, 4):
        one, other = restored(run, step), restored(plain, step)
        for item in ("ema", "state"):
            jax.tree.map(close, one[item], other[item])


@pytest.mark.slow
def test_the_average_is_drawn_with(run, drawn):
    jax.tree.map(np.testing.assert_array_equal, drawn.params, restored(run, 4)["ema"])


@pytest.mark.slow
def test_it_resumes_bit_for_bit(run, base, monkeypatch):  # noqa: F811
    fields = FIELDS | {"stage": "host", "on_host": BOTH}
    signal_after(1, monkeypatch)
    assert train(config(base, **fields), base / "stopped") < 4
    monkeypatch.undo()
    assert train(config(base, **fields), base / "stopped") == 4
    assert metrics(base / "stopped" / "host") == metrics(run)
    jax.tree.map(np.testing.assert_array_equal, restored(base / "stopped" / "host", 4)["state"],
                 restored(run, 4)["state"])


@pytest.mark.slow
def test_a_run_may_go_on_without_it_and_with_it(base, monkeypatch):  # noqa: F811
    signal_after(1, monkeypatch)
    fields = FIELDS | {"stage": "plain", "phases": PHASES}
    assert train(config(base, on_host=("ema",), **fields), base / "moved") < 4
    monkeypatch.undo()
    assert train(config(base, on_host=("moments",), **fields), base / "moved") == 4
    assert train(config(base, **fields), base / "near") == 4
    np.testing.assert_allclose(list(metrics(base / "moved" / "plain").values()),
                               list(metrics(base / "near" / "plain").values()), rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"on_host": ("params",)}, "'params'; use 'moments', 'ema'"),
    ({"on_host": BOTH, "optimizer": OptimizerConfig(moments="bfloat16")}, "optimizer.moments 'bfloat16'"),
    ({"on_host": BOTH, "lora": LoraConfig(("gen",))}, r"lora.groups \('gen',\)"),
])
def test_what_does_not_go_together_is_refused(base, fields, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        config(base, **fields)


def test_a_device_that_reaches_no_such_memory_is_refused(monkeypatch):
    check_host_memory(BOTH)
    monkeypatch.setattr("irg_jax.training.placement.HOST", "moon")
    check_host_memory(())
    with pytest.raises(ValueError, match="'moon' but device, pinned_host"):
        check_host_memory(BOTH)


def test_counters_stay_on_the_device():
    optimizer = make_optimizer(OPTIMIZER, 10)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    where = place(NETWORK, VAE, optimizer, mesh, on_host=BOTH).state
    shapes = jax.eval_shape(optimizer.init, NETWORK.shapes)
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(where.opt), strict=True)
    assert all(isinstance(each, NamedSharding) and (each.memory_kind == HOST) == bool(shape.ndim)
               for shape, each in leaves)
    assert len(jax.tree.leaves(where.ema)) == len(paths_of(NETWORK.shapes))
