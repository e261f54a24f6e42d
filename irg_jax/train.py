"""Trains one stage: `python -m irg_jax.train --config configs/shapes_stage1.py --workdir RUN`.

Any field can be overridden: `--config.data.seed=7`. Killed, the same command resumes. `--topology v5p-128`
takes mesh and packs from the config's table for that slice of TPUs. `--dry_run` tells what would be trained,
on what, and how long, and touches no device.

On several machines, the same command on each. `srun`, `mpirun` and GKE are recognised; on a pod slice of Cloud
TPU add `--distributed`; elsewhere `--coordinator_address HOST:PORT --num_processes N --process_id I`.
"""

import pathlib

import jax
from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.config import TrainConfig
from irg_jax.parallel.hosts import find_place
from irg_jax.parallel.topologies import find_topology
from irg_jax.training import dry_run
from irg_jax.training.loop import train
from irg_jax.training.start import start

command.define_config("Config file of the stage, e.g. configs/shapes_stage1.py.")
flags.DEFINE_string("workdir", None, "Folder of the run, which all hosts see; each stage has one below it.")
flags.DEFINE_bool("dry_run", False, "Tell what would be trained, and end.")
flags.DEFINE_string("topology", "", "Slice of TPUs, as for irg_jax.precompile; the config's table lays it out.")
flags.DEFINE_integer("devices", 1, "With --dry_run, without --topology: devices of the mesh.", lower_bound=1)
flags.DEFINE_float("mfu", 0.4, "With --dry_run: share of the chips' peak that the estimate takes for granted.",
                   lower_bound=0.01, upper_bound=1)
flags.DEFINE_bool("distributed", False, "One of several processes, as Cloud TPU, SLURM or Open MPI tells.")
flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0; the port below it is used too.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
flags.DEFINE_integer("start_timeout", 300, "Seconds after which a host that did not come is named; all end.",
                     lower_bound=1)
flags.mark_flags_as_required(["config"])


def main(values) -> None:
    config = from_config_dict(TrainConfig, values.config)
    topology = find_topology(values.topology) if values.topology else None
    config = config.on(topology) if topology else config
    workdir = pathlib.Path(values.workdir) if values.workdir else None
    if values.dry_run:
        jax.config.update("jax_platforms", "cpu")   # a machine with an accelerator can stay at its work
        print(dry_run.describe(config, workdir, topology=topology, devices=values.devices, mfu=values.mfu))
        return
    if workdir is None:
        raise ValueError("--workdir is missing: the folder of the run")
    place = find_place(values.coordinator_address, values.num_processes, values.process_id,
                       detect=values.distributed)
    with start(config, place, timeout=values.start_timeout) as hosts:
        train(config, workdir, hosts)


if __name__ == "__main__":
    command.run(main)
