"""What a compiled step says about a run: memory, work and the best that can be reached, as one record."""

import dataclasses
import math
from typing import Any

import jax

from irg_jax.config import TrainConfig
from irg_jax.models.config import ModelConfig
from irg_jax.models.lora import LoraConfig
from irg_jax.parallel.compiling import GIB, Report, device_bytes, rounded, summarize
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.topologies import Topology
from irg_jax.training.abstract import Step, lay_out, trace_encoder
from irg_jax.training.optimizer import select
from irg_jax.training.planned import Planned, count_passes, model_flops
from irg_jax.training.state import TrainState


def describe(config: TrainConfig, model: ModelConfig, topology: Topology, mesh: jax.sharding.Mesh, step: Step,
             report: Report, planned: Planned) -> dict[str, Any]:
    """Everything that `irg_jax.precompile` prints; GiB and seconds are a chip's, operations all chips'."""
    data = config.data
    image = count_flops(trace_encoder(config, model).jaxpr).total * planned.latent / data.canvas**2
    useful = data.packs_per_step * model_flops(planned, model, image, count_passes(config))
    executed = count_flops(step.traced.jaxpr, visited_ratio=planned.visited_ratio)
    result = {
        "program": "train", "topology": topology.name, "chips": topology.num_chips, "mesh": dict(mesh.shape),
        "params": sum(math.prod(x.shape) for x in jax.tree.leaves(step.state.params)),
        "packs_per_step": data.packs_per_step, "accumulate": config.accumulate,
        "tokens_per_step": data.packs_per_step * (data.text_tokens + data.vit_tokens + data.latent_tokens),
        "state_gib": device_bytes(step.state) / GIB,
        **{f"{name}_gib": size for name, size in measure_state(config, step.state).items() if name != "all"},
        "options": compare_options(config, model, mesh),
        "fill": planned.fill, "visible_ratio": planned.visible_ratio, "visited_ratio": planned.visited_ratio,
        **summarize(report, topology, useful, executed),
        "overrides": " ".join([f"--config.mesh.{axis}={size}" for axis, size in mesh.shape.items()]
                              + [f"--config.data.packs_per_step={data.packs_per_step}",
                                 f"--config.accumulate={config.accumulate}"]),
    }
    return rounded(result) | {"advice": advise(result)}


def measure_state(config: TrainConfig, state: TrainState) -> dict[str, float]:
    """GiB of a chip: what a run carries from step to step, and the gradients, which no step is without.

    `on_host` is a chip's share of what lies in the host's memory, and not in `all`.
    """
    sizes = {"params": device_bytes(state.params),
             "gradients": device_bytes(select(state.params, config.optimizer.frozen)),
             "moments": device_bytes(state.opt), "ema": device_bytes(state.ema)}
    sizes |= {"all": sum(sizes.values()), "on_host": device_bytes(state, on_host=True)}
    return {name: size / GIB for name, size in sizes.items()}


def compare_options(config: TrainConfig, model: ModelConfig,
                    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict[str, dict[str, float]]:
    """The same with each of the options that let fewer chips do it; nothing is compiled for them."""
    optimizer = config.optimizer
    near = dataclasses.replace(config, on_host=())
    thin = dataclasses.replace(near, lora=LoraConfig(("und", "gen")), optimizer=dataclasses.replace(
        optimizer, frozen=("vit", "connector", "embeddings", "latent")))
    options = {"as configured": config}
    options |= {f"moments {moments}": dataclasses.replace(near, optimizer=dataclasses.replace(
        optimizer, moments=moments)) for moments in ("float32", "bfloat16", "int8")}
    options |= {"moments, EMA on the host": dataclasses.replace(
                    config, on_host=("moments", "ema"), lora=LoraConfig(),
                    optimizer=dataclasses.replace(optimizer, moments="float32")),
                "LoRA of und, gen": thin,
                "LoRA of und, gen in bfloat16": dataclasses.replace(thin, frozen_dtype="bfloat16")}
    return {name: measure_state(option, lay_out(option, model, mesh).state) for name, option in options.items()}


def tabulate(options: dict[str, dict[str, float]]) -> str:
    """`compare_options` as lines of text."""
    columns = list(next(iter(options.values())))
    head = f"{'GiB of a chip':30}" + "".join(f"{name:>11}" for name in columns)
    return "\n".join([head] + [f"{name:30}" + "".join(f"{row[column]:11.3f}" for column in columns)
                               for name, row in options.items()])


def advise(result: dict[str, Any]) -> list[str]:
    """What to change; a sentence each."""
    lines = []
    shards = result["mesh"]["data"] * result["mesh"]["fsdp"]
    parts = result["packs_per_step"] // result["accumulate"] // shards
    if not result["fits"]:
        over = result["peak_hbm_gib"] - result["hbm_gib"]
        lines.append(f"a chip lacks {over:.1f} GiB: {result['state_gib']:.1f} GiB of state and "
                     f"{result['temp_gib']:.1f} of temporaries, the largest {result['largest_temporaries'][0]}")
        if result["state_gib"] > result["hbm_gib"] / 2:
            lines.append("the state fills the chip: split it more ways (mesh.fsdp, mesh.context), or take a "
                         "larger slice")
        elif parts > 1:
            lines.append(f"a chip carries {parts} packs at once: accumulate {result['accumulate'] * parts}, or "
                         "fewer packs_per_step")
        else:
            lines.append("a chip carries one pack already: smaller budgets (data.text_tokens, vit_tokens, "
                         "latent_tokens), mesh.tensor up to 4, or chips with more memory")
    elif result["peak_hbm_gib"] > result["hbm_gib"]:
        lines.append(f"the compiler takes it, for its plan has {result['planned_hbm_gib']:.1f} GiB; by XLA's "
                     f"account it is {result['peak_hbm_gib']:.1f} of {result['hbm_gib']:.1f}: try before you "
                     "count on it")
    if result["replication"] > 1.1:
        lines.append(f"chips do the same work {result['replication']:.2f} times over"
                     + (": mesh.context and mesh.tensor split only what the model splits over them"
                        if result["mesh"]["context"] * result["mesh"]["tensor"] > 1 else ""))
    if result["packs_per_step"] != 8:
        lines.append(f"{result['packs_per_step']} packs a step fill the {shards} shards of the batch; the "
                     "paper's global batch is 8 packs, so this is another experiment")
    return lines
