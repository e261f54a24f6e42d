"""Trains: `python -m irg_jax.train --config configs/shapes_stage1.py --workdir RUN`.

Any field can be overridden: `--config.data.seed=7`. Killed, the same command resumes; fields that have changed
since are named and refused, unless `--accept_changes` names them. A config of several stages (configs/irgl.py)
trains them one after the other, each from what it names in `init_from`; what is finished is left alone.
`--topology v5p-128` takes mesh and packs from the config's table for that slice of TPUs. `--dry_run` tells what
would be trained, on what, and how long, and touches no device.

On several machines, the same command on each. `srun`, `mpirun` and GKE are recognised; on a pod slice of Cloud
TPU add `--distributed`; elsewhere `--coordinator_address HOST:PORT --num_processes N --process_id I`.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict, to_plain
from irg_jax.checkpoints.bundle import is_exported
from irg_jax.checkpoints.seals import ignore_late_faults
from irg_jax.config import TrainConfig
from irg_jax.evaluation.samples import SampleConfig, Samples
from irg_jax.parallel.hosts import find_place
from irg_jax.parallel.topologies import find_topology
from irg_jax.training import dry_run
from irg_jax.training.interrupt import Interrupt
from irg_jax.training.loop import tell, train
from irg_jax.training.start import start

command.define_config("Config file of the stage, e.g. configs/shapes_stage1.py.")
flags.DEFINE_string("workdir", None, "Folder of the run, which all hosts see; each stage has one below it.")
flags.DEFINE_list("accept_changes", [], "Config fields that may have changed since the run was begun.")
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


def read_stages(config: Any) -> list[TrainConfig]:
    """The stages of a config: of its field `stages` {name: stage} in their order, or itself.

    What stands beside `stages` holds in every one of them, whatever it says itself.
    Raises: ValueError naming the field that is wrong.
    """
    config = to_plain(config)
    if "stages" not in config:
        return [from_config_dict(TrainConfig, config)]
    stages = config.pop("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError(f"config field 'stages' is {stages!r}; expected stages by name")
    return [from_config_dict(TrainConfig, merge({"stage": name} | stage, config), f"stages.{name}")
            for name, stage in stages.items()]


def merge(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`values` with `others` in their place, field by field."""
    both = lambda name: isinstance(values.get(name), dict) and isinstance(others[name], dict)
    return values | {name: merge(values[name], others[name]) if both(name) else others[name] for name in others}


def read_samples(config: TrainConfig, workdir: pathlib.Path) -> Samples | None:
    """What draws the stage's samples into its folder; None if it has none."""
    if not config.samples:
        return None
    samples = from_config_dict(SampleConfig, config.samples, "samples")
    return Samples(samples, workdir / config.stage / "samples")


def export(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Writes the stage's EMA to STAGE/export, unless that is younger than the last checkpoint.

    In a process of its own, on the host's processor: the model may be more than an accelerator holds beside all
    else, and where hosts are several Orbax counts on each of them what all do together.
    Raises: ValueError if it fails; that process has told why.
    """
    folder = workdir / config.stage
    target = folder / "export"
    if not config.export or is_exported(target, folder):
        return
    if target.exists():
        shutil.rmtree(target)    # of a stage that has gone on since
    again = [sys.executable, "-m", "irg_jax.export", f"--checkpoint={folder}", f"--format={config.export}",
             f"--out={target}"]
    if subprocess.run(again, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False).returncode:
        raise ValueError(f"{folder} is trained and could not be exported; again: {shlex.join(again)}")


def main(values) -> None:
    topology = find_topology(values.topology) if values.topology else None
    stages = [config.on(topology) if topology else config for config in read_stages(values.config)]
    workdir = pathlib.Path(values.workdir) if values.workdir else None
    if values.dry_run:
        jax.config.update("jax_platforms", "cpu")   # a machine with an accelerator can stay at its work
        for number, config in enumerate(stages):
            print(dry_run.describe(config, workdir, topology=topology, devices=values.devices, mfu=values.mfu,
                                   earlier=stages[:number]))
        return
    if workdir is None:
        raise ValueError("--workdir is missing: the folder of the run")
    place = find_place(values.coordinator_address, values.num_processes, values.process_id,
                       detect=values.distributed)
    draws = [read_samples(config, workdir) for config in stages]    # refused now, or never
    with start(stages, place, timeout=values.start_timeout) as hosts:
        interrupt = Interrupt(hosts)
        for config, draw in zip(stages, draws, strict=True):
            reached = train(config, workdir, hosts, accepted=values.accept_changes, draw=draw,
                            interrupt=interrupt)
            if reached < config.total_steps:
                return
            if interrupt.reached():
                tell(hosts, f"{workdir / config.stage}: stopped when it was trained; the same command goes on")
                return
            with hosts.together():    # the others wait for it
                if hosts.is_first:
                    export(config, workdir)


if __name__ == "__main__":
    ignore_late_faults()    # a save that failed is told in one sentence
    command.run(main)
