"""Drawing one image as shapes to trace with: the costliest program of a trajectory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.models.config import ModelConfig
from irg_jax.parallel.compiling import GIB, Report, abstract, device_bytes, rounded, summarize
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import BATCH_AXES, param_shardings, replicated
from irg_jax.parallel.topologies import Topology
from irg_jax.sampling.cache import Context, make_empty
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.flow import Branches, draw_latent
from irg_jax.sampling.programs import network


class Draw(NamedTuple):
    """A traced program that draws images, what it was traced with, and how many tokens its passes compute."""

    traced: jax.stages.Traced
    params: Any
    branches: Branches
    passes: int      # of the network for one image, guidance counted
    tokens: int      # of one pass


def trace_draw(model: ModelConfig, config: SamplingConfig, mesh: jax.sharding.Mesh, *, images: int,
               context: int) -> Draw:
    """The second turn's drawing after `images` contexts of `context` tokens, dealt over the batch axes."""
    llm = network(model)
    dtype = jnp.dtype(config.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), llm.shapes)
    params = abstract(params, param_shardings(llm.axes, llm.shapes, mesh))
    contexts = jax.eval_shape(lambda: make_empty(model, images, context, dtype))
    contexts = abstract(contexts, context_shardings(contexts, mesh))
    side = model.pixels_per_token
    tokens = (config.height // side) * (config.width // side)
    array = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    dealt = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    noise = array((images, tokens, model.latent_channels), jnp.float32, dealt)
    position, brackets = (array((size,), jnp.int32, replicated(mesh)) for size in (tokens, 2))
    branches, flow = Branches(contexts, contexts, contexts), config.turn2
    # Drawing reads neither the embedding of words, nor the head, nor the ViT; they lie in memory all the same.
    draw = jax.jit(lambda params, branches, noise, position, brackets: draw_latent(
        llm.bind(params), branches, noise, position, brackets, flow), out_shardings=dealt, keep_unused=True)
    with jax.set_mesh(mesh):
        traced = draw.trace(params, branches, noise, position, brackets)
    return Draw(traced, params, branches, 3 * (flow.num_timesteps - 1), tokens + 2)


def context_shardings(contexts: Context, mesh: jax.sharding.Mesh) -> Context:
    """Contexts are dealt like packs, and their heads over `tensor`."""
    dealt = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    heads = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor"))
    rest = jax.tree.map(lambda x: dealt if x.ndim else replicated(mesh), contexts)
    return rest._replace(kv=jax.tree.map(lambda _: heads, contexts.kv))


def describe(draw: Draw, report: Report, topology: Topology, mesh: jax.sharding.Mesh, images: int
             ) -> dict[str, Any]:
    """Everything that `irg_jax.precompile` prints of a drawing; nothing in it is computed twice."""
    executed = count_flops(draw.traced.jaxpr)
    result = rounded({
        "program": "generate", "topology": topology.name, "chips": topology.num_chips,
        "mesh": dict(mesh.shape), "params": sum(math.prod(x.shape) for x in jax.tree.leaves(draw.params)),
        "images": images, "context_tokens": draw.branches.main.capacity, "passes": draw.passes,
        "tokens_per_step": images * draw.passes * draw.tokens,
        "state_gib": device_bytes((draw.params, draw.branches)) / GIB,
        **summarize(report, topology, executed.total, executed)})
    return result | {"advice": advise(result)}


def advise(result: dict[str, Any]) -> list[str]:
    """What to change if the drawing does not fit; a sentence each."""
    if result["fits"]:
        return []
    over, mesh, images = result["peak_hbm_gib"] - result["hbm_gib"], result["mesh"], result["images"]
    lines = [f"a chip lacks {over:.1f} GiB: {result['state_gib']:.1f} GiB of weights and contexts and "
             f"{result['temp_gib']:.1f} of temporaries"]
    if mesh["tensor"] < 4:
        lines.append(f"split the weights more ways: --mesh fsdp={mesh['fsdp']},tensor={2 * mesh['tensor']}, on "
                     f"twice the chips, draws as many images at once ({images}); more fsdp draws more of them")
    lines.append(f"a context of {result['context_tokens']} tokens may be longer than the trajectory needs: "
                 "--context; two turns at 1024 x 1024 have about 10,000")
    return lines
