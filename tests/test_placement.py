"""Checkpoints straight onto a mesh: the same values as on the host, where the table says, or refused."""

import dataclasses

import jax
import numpy as np
import pytest

from checkpoint_cases import CONFIG, assert_same, make_model, make_tokenizer
from irg_jax.checkpoints import store
from irg_jax.checkpoints.model import cast, load_model, save_model
from irg_jax.checkpoints.placement import load_frozen, load_onto
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG
from irg_jax.parallel.compiling import abstract
from irg_jax.parallel.sharding import MeshConfig, make_mesh, param_shardings
from test_model_checkpoint import save_stage

NETWORK = Functional(lambda rngs: IRG(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def shardings():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    return param_shardings(NETWORK.axes, NETWORK.shapes, mesh)


@pytest.fixture(params=["checkpoint", "stage"])
def folder(request, tmp_path):
    model = make_model("bfloat16", tokenizer=make_tokenizer())
    if request.param == "checkpoint":
        save_model(tmp_path / "model", model)
        return tmp_path / "model"
    whole = cast(model, "float32")
    save_stage(tmp_path / "stage", whole, {3: whole})
    return tmp_path / "stage"


def test_every_parameter_lies_where_the_table_says(folder, shardings, monkeypatch):
    monkeypatch.setattr(store, "PIECE_BYTES", 5000)
    placed = load_onto(folder, abstract(NETWORK.shapes, shardings))
    on_host = jax.tree.map(lambda x: np.asarray(x, np.float32), load_model(folder).params)
    lies_there = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(lies_there, placed, shardings)))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, on_host)


def test_the_rest_comes_without_the_network(folder):
    assert_same(load_frozen(folder), dataclasses.replace(load_model(folder), params={}))


def test_no_more_than_a_piece_is_read_at_once(tmp_path, shardings, monkeypatch):
    save_model(tmp_path / "model", make_model())
    sizes, read = [], store.Reader.read

    def watched(reader, paths):
        found = read(reader, paths)
        sizes.append((len(found), sum(leaf.nbytes for leaf in found.values())))
        return found

    monkeypatch.setattr(store.Reader, "read", watched)
    monkeypatch.setattr(store, "PIECE_BYTES", 5000)
    load_onto(tmp_path / "model", abstract(NETWORK.shapes, shardings))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(make_model().params))
    assert len(sizes) > 5 and all(size < 5000 + largest for _, size in sizes)


def test_a_flipped_bit_is_refused_by_name(tmp_path, shardings, monkeypatch):
    save_model(tmp_path / "model", make_model())
    monkeypatch.setattr(store, "digest", lambda array: "0")
    with pytest.raises(ValueError, match="is damaged; these parameters are not what was written: model"):
        load_onto(tmp_path / "model", abstract(NETWORK.shapes, shardings))
