"""What freezes, thaws or is switched off at a step; what is frozen has neither moments nor gradient."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from irg_jax.checkpoints.bundle import Bundles
from irg_jax.checkpoints.model import load_model
from irg_jax.config import Phase
from irg_jax.models.functional import Functional
from irg_jax.models.groups import GROUPS, group_of, paths_of, replace
from irg_jax.models.irg import IRG
from irg_jax.training.loop import train
from irg_jax.training.optimizer import OptimizerConfig, make_optimizer, select
from test_loop import base, config, metrics, signal_after  # noqa: F401 (a fixture)

PHASES = (Phase("drawing", 2, frozen=("und", "vit", "connector", "embeddings"), ce_weight=0.0),
          Phase("all again", 4))


@pytest.fixture(scope="module")
def run(base):  # noqa: F811
    """Six steps in three phases, each step saved."""
    phased = config(base, stage="phased", total_steps=6, save_every=1, keep=10, phases=PHASES)
    assert train(phased, base / "run") == 6
    return base / "run" / "phased"


def restored(run, step):
    bundles = Bundles(run, keep=None)
    items = bundles._checkpointer.load_checkpointables(step, {"state": None, "ema": None, "position": None})
    bundles.close()
    return items


def test_every_parameter_is_in_one_group(base):  # noqa: F811
    shapes = Functional(lambda rngs: IRG(load_model(base / "base").config, rngs=rngs)).shapes
    paths = paths_of(shapes)
    assert {group_of(path) for path in paths} == set(GROUPS)
    for group in GROUPS:
        rest = paths_of(select(shapes, (group,)))
        assert {group_of(path) for path in paths if path not in rest} == {group}


def test_what_is_selected_goes_back_to_its_place():
    params = {"vit": {"a": 1}, "embed": 2, "decoder": {"layers": {"und": {"q": 3}, "gen": {"q": 4}}, "norm": 5}}
    trained = select(params, ("decoder.layers.und", "embed"))
    assert trained == {"vit": {"a": 1}, "decoder": {"layers": {"gen": {"q": 4}}, "norm": 5}}
    doubled = replace(params, jax.tree.map(lambda x: 10 * x, trained))
    assert doubled == {"vit": {"a": 10}, "embed": 2,
                       "decoder": {"layers": {"und": {"q": 3}, "gen": {"q": 40}}, "norm": 50}}
    with pytest.raises(ValueError, match="nothing is left to train"):
        select(params, tuple(params))


def test_the_optimiser_has_moments_of_what_trains_alone():
    params = {"vit": {"a": np.ones(3, np.float32)}, "embed": np.ones(2, np.float32)}
    state = make_optimizer(OptimizerConfig(frozen=("vit",)), 10).init(params)
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == [(2,), (2,)]


@pytest.mark.slow
def test_a_phase_freezes_drops_moments_and_the_checkpoint_knows(run):
    of = lambda step: str(jax.tree.structure(restored(run, step)["state"]["opt"]))
    moments = {step: of(step) for step in (2, 3, 5)}
    assert all("'vit'" in moments[step] for step in (2, 5)) and "'vit'" not in moments[3]
    assert restored(run, 3)["position"]["frozen"] == list(PHASES[0].frozen)
    assert restored(run, 2)["position"]["frozen"] == restored(run, 5)["position"]["frozen"] == []
    at = {step: restored(run, step)["state"]["params"] for step in (2, 4, 5)}
    same = lambda one, other: jax.tree.all(jax.tree.map(np.array_equal, at[one], at[other]))
    for name in ("vit", "connector", "embed"):
        assert jax.tree.all(jax.tree.map(np.array_equal, at[2][name], at[4][name]))
    assert not np.array_equal(at[4]["embed"], at[5]["embed"]) and not same(2, 4)


@pytest.mark.slow
def test_a_phase_tells_of_its_groups(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    groups = [{name.partition("/")[2] for name in line if name.startswith("grad_norm/")} for line in lines]
    assert groups[1] == groups[5] == set(GROUPS) and groups[2] == groups[3] == {"gen", "latent"}
    assert all(line["ce"] > 0 for line in lines)     # off, it is told all the same
    assert lines[2]["loss"] == pytest.approx(lines[2]["mse"])
    whole = [line["grad_norm"]**2 for line in lines]
    parts = [sum(line[f"grad_norm/{name}"]**2 for name in names) for line, names in zip(lines, groups)]
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    assert all(0 < line["update_ratio"] < 0.1 for line in lines)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0), ("phase", 2), ("phase", 4), ("end", 6)]


@pytest.mark.slow
def test_losses_of_the_groups_make_up_the_whole(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind in ("ce", "mse"):
        for line in lines:
            parts = [value for name, value in line.items() if name.startswith(f"{kind}/")]
            assert parts and min(parts) - 1e-6 <= line[kind] <= max(parts) + 1e-6


@pytest.mark.slow
def test_a_run_that_stops_where_a_phase_begins_resumes_bit_for_bit(run, base, monkeypatch):  # noqa: F811
    fields = {"stage": "phased", "total_steps": 6, "save_every": 1, "keep": 10, "phases": PHASES}
    signal_after(1, monkeypatch)
    assert train(config(base, **fields), base / "stopped") < 6
    monkeypatch.undo()
    assert train(config(base, **fields), base / "stopped") == 6
    assert metrics(base / "stopped" / "phased") == metrics(run)


@pytest.mark.parametrize("phases, message", [
    ((Phase("late", 6),), "between 1 and total_steps - 1 = 5"),
    ((Phase("b", 3), Phase("a", 2)), "they must rise"),
])
def test_phases_out_of_place_are_refused(base, phases, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(base, total_steps=6), phases=phases)


def test_a_name_that_freezes_nothing_is_refused_before_the_first_step(base):  # noqa: F811
    with pytest.raises(ValueError, match="below 'vitt'; the groups are und, gen,"):
        train(config(base, stage="misnamed", phases=(Phase("x", 3, frozen=("vitt",)),)), base / "run")
