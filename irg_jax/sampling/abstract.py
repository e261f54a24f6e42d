"""Drawing an image and writing a token as shapes to trace with: the costliest programs of a trajectory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.models.config import ModelConfig
from irg_jax.models.quantized import is_quantized
from irg_jax.parallel.compiling import GIB, Report, abstract, device_bytes, rounded, summarize
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import BATCH_AXES, param_shardings, replicated
from irg_jax.parallel.topologies import Topology
from irg_jax.sampling.cache import Context, append_text, context_shardings, make_empty
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.flow import Branches, draw_latent
from irg_jax.sampling.programs import network

WORDS = 2048    # tokens of two turns without images, at most: the prompts and two thoughts


class Program(NamedTuple):
    """A traced program, what it was traced with, and what else is told of it."""

    name: str
    traced: jax.stages.Traced
    arguments: tuple     # parameters and contexts; what is small is left out
    facts: dict[str, int]


def trace_draw(model: ModelConfig, config: SamplingConfig, mesh: jax.sharding.Mesh, *, images: int,
               context: int) -> Program:
    """The second turn's drawing after `images` contexts of `context` tokens, dealt over the batch axes.

    What was read without images has at most `WORDS` tokens.
    """
    params, main = _params(model, config, mesh), _contexts(model, config, mesh, images, context)
    unseen = _contexts(model, config, mesh, images, min(context, WORDS))
    branches, flow, llm = Branches(main, main.view, unseen), config.turn2, network(model, config.weights)
    tokens = config.height * config.width // model.pixels_per_token**2
    dealt = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    noise = _array((images, tokens, model.latent_channels), jnp.float32, dealt)
    position, brackets = (_array((size,), jnp.int32, replicated(mesh)) for size in (tokens, 2))
    # Drawing reads neither the embedding of words, nor the head, nor the ViT; they lie in memory all the same.
    draw = jax.jit(lambda params, branches, noise, position, brackets: draw_latent(
        llm.bind(params), branches, noise, position, brackets, flow), out_shardings=dealt, keep_unused=True)
    with jax.set_mesh(mesh):
        traced = draw.trace(params, branches, noise, position, brackets)
    passes = 3 * (flow.num_timesteps - 1)   # of the network for one image, guidance counted
    return Program("generate", traced, (params, branches), {
        "images": images, "context_tokens": context, "passes": passes,
        "tokens_per_step": images * passes * (tokens + 2)})


def trace_token(model: ModelConfig, config: SamplingConfig, mesh: jax.sharding.Mesh, *, texts: int,
                context: int) -> Program:
    """One more token of each of `texts` texts, the likeliest: what the loop of `text.write_on` repeats."""
    params, contexts = _params(model, config, mesh), _contexts(model, config, mesh, texts, context)
    tokens = _array((texts, 1), jnp.int32, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    def write(params, kv, view, tokens):
        network_ = network(model, config.weights).bind(params)
        context, hidden = append_text(network_, Context(kv, view), tokens, jnp.ones_like(tokens[:, 0]))
        return context, jnp.argmax(network_.logits(hidden), -1)
    with jax.set_mesh(mesh):
        traced = jax.jit(write, donate_argnames="kv", keep_unused=True).trace(params, *contexts, tokens)
    return Program("write", traced, (params, contexts), {
        "texts": texts, "context_tokens": context, "tokens_per_step": texts})


def _params(model: ModelConfig, config: SamplingConfig, mesh: jax.sharding.Mesh) -> Any:
    llm = network(model, config.weights)
    dtype = jnp.dtype(config.dtype)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_quantized(path, x) else jax.ShapeDtypeStruct(x.shape, dtype), llm.shapes)
    return abstract(params, param_shardings(llm.axes, llm.shapes, mesh))


def _contexts(model: ModelConfig, config: SamplingConfig, mesh: jax.sharding.Mesh, count: int, capacity: int
              ) -> Context:
    made = jax.eval_shape(lambda: make_empty(model, count, capacity, jnp.dtype(config.dtype)))
    return abstract(made, context_shardings(made, mesh))


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def describe(program: Program, report: Report, topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Everything that `irg_jax.precompile` prints of a program; nothing in it is computed twice."""
    executed, (params, _) = count_flops(program.traced.jaxpr), program.arguments
    result = rounded({
        "program": program.name, "topology": topology.name, "chips": topology.num_chips,
        "mesh": dict(mesh.shape), "params": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        **program.facts, "state_gib": device_bytes(program.arguments) / GIB,
        **summarize(report, topology, executed.total, executed)})
    return result | {"advice": advise(result)}


def advise(result: dict[str, Any]) -> list[str]:
    """What to change if a program does not fit; a sentence each."""
    if result["fits"]:
        return []
    over, mesh = result["peak_hbm_gib"] - result["hbm_gib"], result["mesh"]
    at_once = result.get("images") or result["texts"]
    lines = [f"a chip lacks {over:.1f} GiB: {result['state_gib']:.1f} GiB of weights and contexts and "
             f"{result['temp_gib']:.1f} of temporaries"]
    if mesh["tensor"] < 4:
        lines.append(f"split the weights more ways: --mesh fsdp={mesh['fsdp']},tensor={2 * mesh['tensor']}, on "
                     f"twice the chips, does as many at once ({at_once}); more fsdp does more of them")
    lines.append(f"a context of {result['context_tokens']} tokens may be longer than the trajectory needs: "
                 "--context; two turns at 1024 x 1024 have about 10,000")
    return lines
