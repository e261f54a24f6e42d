"""What a chip holds at the end of a step, when moments and EMA lie in the host's memory (`on_host`).

    PYTHONPATH=.venv/libtpu python -m benchmarks.offload

Compiles, for TPUs that are not there, the update of BAGEL-7B-MoT alone: clipping, AdamW and
average of stage 1. GiB are a chip's; the limit is what the step needs in any case: parameters and gradients.
Two minutes of a core. Prints one JSON object last and writes it to benchmarks/results/offload.json.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import machine
from data_pipelines import command
from data_pipelines.config import from_config_dict, load_config
from irg_jax.config import BAGEL_7B_MOT, TrainConfig
from irg_jax.parallel.compiling import GIB, device_bytes, rounded
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.parallel.topologies import compile_devices, find_topology
from irg_jax.training.abstract import lay_out
from irg_jax.training.optimizer import make_optimizer
from irg_jax.training.update import make_update

CONFIG = "configs/irgl_stage1.py"
WAYS = ((), ("ema",), ("moments",), ("moments", "ema"))


def measure(config: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    network, _, placement, state, _ = lay_out(config, BAGEL_7B_MOT, mesh)
    update = make_update(network, config.optimizer, make_optimizer(config.optimizer, config.total_steps))
    scalars = [jax.ShapeDtypeStruct((), dtype, sharding=placement.scalar) for dtype in (jnp.float32, jnp.bool_)]
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=(placement.state, placement.scalar))
    compiled = step.trace(state, state.params, *scalars).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    return {"arguments_gib": memory.argument_size_in_bytes / GIB, "temp_gib": memory.temp_size_in_bytes / GIB,
            "chip_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
            "host_gib": (memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes) / GIB,
            "limit_gib": 2 * device_bytes(state.params) / GIB}


def main(values: Any) -> None:
    jax.config.update("jax_platforms", "cpu")
    config = from_config_dict(TrainConfig, values.config or load_config(CONFIG))
    topology, ways = find_topology(values.topology), {}
    about = machine.describe("jax", "libtpu")
    mesh = make_mesh(MeshConfig(), compile_devices(topology))
    for way in WAYS:
        name = ", ".join(way) or "nothing"
        ways[name] = measure(dataclasses.replace(config, on_host=way), mesh)
        print(f"{name} on the host: {ways[name]['chip_gib']:.2f} GiB on the chip", flush=True)
    machine.keep(rounded({"benchmark": "offload", **about, "topology": topology.name, "mesh": dict(mesh.shape),
                          "on_host": ways}), values.out)


if __name__ == "__main__":
    command.define_config(f"The configuration of a training stage; by default {CONFIG}.")
    flags.DEFINE_string("topology", "v5p-16", "TPU slice; its chips split the parameters.")
    flags.DEFINE_string("out", str(machine.RESULTS / "offload.json"), "The result file.")
    command.run(main)
