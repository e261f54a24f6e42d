"""Trains one stage: `python -m irg_jax.train --config configs/shapes_stage1.py --workdir RUN`.

Any field can be overridden: `--config.data.seed=7`. Killed, the same command resumes.
"""

import pathlib

from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.config import TrainConfig
from irg_jax.training.loop import train

command.define_config("Config file of the stage, e.g. configs/shapes_stage1.py.")
flags.DEFINE_string("workdir", None, "Folder of the run; the stage writes to its folder below.")
flags.mark_flags_as_required(["config", "workdir"])


def main(values) -> None:
    train(from_config_dict(TrainConfig, values.config), pathlib.Path(values.workdir))


if __name__ == "__main__":
    command.run(main)
