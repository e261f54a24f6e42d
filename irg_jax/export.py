"""Writes a model for use elsewhere.

    python -m irg_jax.export --checkpoint DIR --format bagel|orbax --out DIR \\
        [--dtype float32|bfloat16]

The checkpoint is a model checkpoint, or a stage folder of a run, whose newest EMA is taken. `bagel`
is the layout of the BAGEL release, `orbax` a model checkpoint for inference with this package.
"""

import pathlib

from absl import flags

from data_pipelines import command
from irg_jax.checkpoints.bagel import export_folder, export_leaves
from irg_jax.checkpoints.model import PARAMS, cast, load_model, open_model, save_model
from irg_jax.checkpoints.store import DTYPES


def main(values) -> None:
    checkpoint = pathlib.Path(values.checkpoint)
    if values.format == "orbax":
        save_model(values.out, cast(load_model(checkpoint), values.dtype))
    elif (checkpoint / PARAMS).is_dir():   # leaf by leaf: the model may be larger than the memory
        config, tokenizer, reader = open_model(checkpoint)
        export_leaves(values.out, config, tokenizer, {name: leaf.dtype for name, leaf in reader.leaves.items()},
                      reader.in_turn, dtype=values.dtype)
    else:
        export_folder(load_model(checkpoint), values.out, dtype=values.dtype)
    print(f"exported {values.checkpoint} to {values.out}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A model checkpoint or a stage folder (RUN/stage2).")
    flags.DEFINE_enum("format", None, ["bagel", "orbax"], "What to write.")
    flags.DEFINE_string("out", None, "Folder to write; absent or empty.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the network; by default the checkpoint's. The "
                      "autoencoder keeps its own.")
    flags.mark_flags_as_required(["checkpoint", "format", "out"])
    command.run(main)
