"""The training step of a run as arguments to trace with: shapes, dtypes and shardings, and not one array."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import PackedBatch
from data_pipelines.packing import empty_pack
from irg_jax.config import TrainConfig, check_model
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import paths_of
from irg_jax.models.irg import make_autoencoder
from irg_jax.parallel.compiling import abstract
from irg_jax.training.losses import encode_image
from irg_jax.training.optimizer import make_optimizer
from irg_jax.training.placement import Placement, check_share, place
from irg_jax.training.state import TrainState, create_state
from irg_jax.training.step import make_step


class Layout(NamedTuple):
    """What a run carries, as shapes with shardings, and the networks that it is of."""

    network: Functional
    vae: Functional
    placement: Placement
    state: TrainState
    vae_params: Any


class Step(NamedTuple):
    """A traced step, and what it was traced with."""

    traced: jax.stages.Traced
    state: TrainState
    vae: Any
    batch: PackedBatch


def trace_step(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Step:
    """Traces `make_step` as the loop compiles it; images come as pixels, so the frozen encoder is inside.

    Raises: ValueError if config, geometry and mesh do not fit together.
    """
    check_model(config.data, model)
    check_share(config, mesh)
    network, vae, placement, state, vae_params = lay_out(config, model, mesh)
    packs = config.data.packs_per_step
    batch = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct((packs, *x.shape), x.dtype, sharding=where),
                         empty_pack(config.data), placement.batch)
    step = jax.jit(make_step(network, vae, config.step_config()), donate_argnums=0,
                   out_shardings=(placement.state, placement.scalar))
    with jax.set_mesh(mesh):
        return Step(step.trace(state, vae_params, batch), state, vae_params, batch)


def lay_out(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
            ) -> Layout:
    """The state of a run on a mesh, which may be one without devices."""
    network, never = config.network(model), config.never_trained(config.network(model).shapes)
    vae = Functional(lambda rngs: make_autoencoder(model, rngs=rngs))
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    placement = place(network, vae, optimizer, mesh, never, config.on_host)
    state = jax.eval_shape(lambda params: create_state(params, optimizer, never),
                           hold(network.shapes, never, config.frozen_dtype))
    return Layout(network, vae, placement, abstract(state, placement.state),
                  abstract(vae.shapes, placement.vae))


def hold(shapes: Params, never: Collection[str], dtype: str) -> Params:
    """Shapes of parameters as a run holds them: what never trains in `dtype`."""
    leaves = [jax.ShapeDtypeStruct(x.shape, dtype) if path in never else x
              for path, x in zip(paths_of(shapes), jax.tree.leaves(shapes), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def trace_encoder(config: TrainConfig, model: ModelConfig) -> jax.stages.Traced:
    """The frozen encoder on one canvas."""
    vae = Functional(lambda rngs: make_autoencoder(model, rngs=rngs))
    canvas, values = config.data.canvas, config.data.latent_patch**2 * 3
    pixels = jax.ShapeDtypeStruct((canvas * canvas, values), jnp.uint8)
    side = jax.ShapeDtypeStruct((), jnp.int32)
    encode = lambda params, *image: encode_image(vae.bind(params), *image, jnp.dtype(config.dtype))
    return jax.jit(encode).trace(vae.shapes, pixels, side, side)
