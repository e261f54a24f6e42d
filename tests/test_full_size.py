"""The whole training state of the real model, on meshes of 8 to 512 devices, without one of them."""

import collections
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from checkpoint_cases import RELEASE
from data_pipelines.config import from_config_dict, load_config
from irg_jax.config import TrainConfig, check_model
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.sharding import MESH_AXES
from irg_jax.training.optimizer import make_optimizer
from irg_jax.training.placement import check_share, place
from irg_jax.training.state import create_state

MESHES = [  # data, fsdp, tensor, context
    (1, 8, 1, 1), (1, 4, 2, 1), (1, 8, 2, 1), (1, 8, 4, 1), (1, 8, 1, 8), (1, 8, 4, 2), (2, 4, 4, 4),
    (1, 8, 4, 8), (2, 4, 4, 16), (1, 8, 4, 16)]


@pytest.fixture(scope="module", params=["irgl_stage1", "irgl_stage2"])
def stage(request):
    config = from_config_dict(TrainConfig, load_config(f"configs/{request.param}.py"))
    model = Functional(lambda rngs: IRG(RELEASE, rngs=rngs))
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    state = jax.eval_shape(lambda params: create_state(params, optimizer), model.shapes)
    return config, model, optimizer, state


def num_bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_the_state_has_four_values_a_parameter_all_float32(stage):
    config, model, _, state = stage
    check_model(config.data, RELEASE)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))
    assert 14.5e9 < parameters < 14.607e9   # the released tensors also hold fixed position tables
    kinds = collections.Counter()
    for leaf in jax.tree.leaves(state):
        kinds[leaf.dtype.name] += math.prod(leaf.shape)
    assert kinds["float32"] == 4 * parameters and sum(kinds.values()) - kinds["float32"] < 10


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_splits_it_evenly(stage, sizes):
    """What one device holds is its share, but for vectors and the encoder, which divide less often."""
    config, model, optimizer, state = stage
    mesh = AbstractMesh(sizes, MESH_AXES)
    check_share(config, mesh)
    layout = place(model, Functional(lambda rngs: make_autoencoder(RELEASE, rngs=rngs)), optimizer, mesh)
    assert jax.tree.structure(layout.state) == jax.tree.structure(state)
    part = lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)
    own = jax.tree.map(part, state, layout.state)
    share = num_bytes(own) / (num_bytes(state) / math.prod(sizes[1:]))
    assert 1 <= share < 1.15
