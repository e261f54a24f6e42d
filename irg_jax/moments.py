"""Computes the frozen encoder's moments of a data set, so that training skips the encoder.

    python -m irg_jax.moments --config configs/irgl_stage1.py --checkpoint DIR --out MOMENTS

reads the groups and transforms of the config's data, and writes MOMENTS; then train with
`--config.data.moments=MOMENTS`. Interrupted, it resumes.
"""

import pathlib

from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.checkpoints.model import load_model
from irg_jax.config import TrainConfig, check_model
from irg_jax.training.moments import compute_moments


def main(values) -> None:
    config, model = from_config_dict(TrainConfig, values.config), load_model(values.checkpoint)
    check_model(config.data, model.config)
    bad = compute_moments(config.data, model, pathlib.Path(values.out), dtype=config.dtype, store=values.store,
                          batch_size=values.batch_size)
    print(f"wrote {values.out}" + (f"; {bad} records could not be read and are empty" if bad else ""))


if __name__ == "__main__":
    command.define_config("A training configuration; its data say what is encoded.")
    flags.DEFINE_string("checkpoint", None, "Model checkpoint whose autoencoder encodes.")
    flags.DEFINE_string("out", None, "Folder of the moments.")
    flags.DEFINE_enum("store", "float16", ["float16", "float32"], "How the values are kept.")
    flags.DEFINE_integer("batch_size", 8, "Images encoded at once, over all local devices.", lower_bound=1)
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
