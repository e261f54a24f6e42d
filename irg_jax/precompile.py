r"""Compiles the full-size step for a TPU slice that is not there: does it fit, and how fast can it be at best?

    python -m irg_jax.precompile --config configs/irgl_stage1.py --topology v5p-128
    python -m irg_jax.precompile --config configs/irgl_stage1.py --topology v6e:1x1 --mesh fsdp=1 \
        --program generate

`--program` is the training step, or `generate`, drawing, or `write`, writing texts. Nothing is allocated and no
weights are needed; libtpu must be installed (pip install '.[tpu]'), or lie where launch/test.sh puts it
(PYTHONPATH=.venv/libtpu). Mesh and packs are those of the config's table `topologies`, or the config's own for
a slice that it lacks, and can be overridden: `--mesh data=4,fsdp=16 --packs 64`. Prints what a chip carries
with each option that saves memory (`moments`, `on_host`, `lora`, `frozen_dtype`), and one JSON object last;
ends with status 1 if the compiler refuses the program for want of memory.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.config import BAGEL_7B_MOT, TrainConfig
from irg_jax.models.quantized import DTYPES
from irg_jax.parallel.compiling import compile_report
from irg_jax.parallel.sharding import make_mesh, parse_mesh
from irg_jax.parallel.topologies import Topology, compile_devices, find_topology
from irg_jax.sampling import abstract as sampling
from irg_jax.sampling.config import SamplingConfig
from irg_jax.training import estimate
from irg_jax.training.abstract import trace_step
from irg_jax.training.planned import plan_packs


def override(config: TrainConfig, mesh: str, packs: int) -> TrainConfig:
    """The config with the mesh ("data=4,fsdp=16") and the packs of the command line.

    Raises: ValueError if the mesh cannot be read.
    """
    if mesh:
        config = dataclasses.replace(config, mesh=parse_mesh(mesh))
    if packs:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, packs_per_step=packs))
    return config


def train(config: TrainConfig, topology: Topology, tile: int) -> dict[str, Any]:
    """The training step's report."""
    mesh = make_mesh(config.mesh, compile_devices(topology))
    planned = plan_packs(config.data, tile=tile)
    step = trace_step(config, BAGEL_7B_MOT, mesh)
    report = compile_report(step.traced, (step.state, step.vae, step.batch), topology.num_chips)
    return estimate.describe(config, BAGEL_7B_MOT, topology, mesh, step, report, planned)


def generate(config: TrainConfig, topology: Topology, sampled: SamplingConfig, program: str,
             context: int) -> dict[str, Any]:
    """The report on drawing a second image, or on a token of text, one on each shard of the batch."""
    mesh = make_mesh(config.mesh, compile_devices(topology))
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if program == "generate":
        traced = sampling.trace_draw(BAGEL_7B_MOT, sampled, mesh, images=count, context=context)
    else:
        traced = sampling.trace_token(BAGEL_7B_MOT, sampled, mesh, texts=count, context=context)
    report = compile_report(traced.traced, traced.arguments, topology.num_chips)
    return sampling.describe(traced, report, topology, mesh)


def main(values: Any) -> None:
    jax.config.update("jax_platforms", "cpu")   # a machine with a TPU can stay at its work
    topology = find_topology(values.topology)
    if values.weights and values.program == "train":
        raise ValueError(f"--weights {values.weights} is for --program generate or write; training rounds none")
    config = from_config_dict(TrainConfig, values.config).on(topology)
    config = override(config, values.mesh, values.packs)
    print(f"compiling for {topology.name}: minutes of one core", flush=True)
    if values.program == "train":
        result = train(config, topology, values.tile)
        print(estimate.tabulate(result["options"]))
    else:
        sampled = SamplingConfig(weights=values.weights)
        result = generate(config, topology, sampled, values.program, values.context)
    print(json.dumps(result, indent=1))
    if not result["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    command.define_config("Config file of a training stage, e.g. configs/irgl_stage1.py.")
    flags.DEFINE_string("topology", None, "TPU slice: v5p:4x4x4, v5p-128, v6e-256, ...")
    flags.DEFINE_enum("program", "train", ["train", "generate", "write"],
                      "The step, the drawing of a second image, or one token of text.")
    flags.DEFINE_integer("context", 10_240, "Tokens of a context that is drawn or written after.",
                         lower_bound=1)
    flags.DEFINE_enum("weights", None, DTYPES, "What kernels are rounded to for drawing and writing.")
    flags.DEFINE_string("mesh", "", "Instead of the table's: data=4,fsdp=16; axes left out are 1.")
    flags.DEFINE_integer("packs", 0, "Packs of a step, instead of the table's.", lower_bound=0)
    flags.DEFINE_integer("tile", 512, "Side of the attention kernel's tiles, for the share that it visits.",
                         lower_bound=1)
    flags.mark_flags_as_required(["config", "topology"])
    command.run(main)
