r"""Draws training prompts with the base model: the first images that IRGL's improving records start from.

    python -m irg_jax.draft --config configs/shapes_generate.py --checkpoint runs/shapes/base \
        --num 3500 --out runs/shapes/drafts

The base model is given the prompt and a plan that says what there will be, and draws.
`data_pipelines.build` reads the folder with --config.drafts=runs/shapes/drafts.
Interrupted, the same command draws only what is missing.
"""

import pathlib
from typing import Any

from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.drafting import make_drafts


def main(values: Any) -> None:
    is_new = make_drafts(values.checkpoint, from_config_dict(SamplingConfig, values.config), values.num,
                         seed=values.seed, out=pathlib.Path(values.out), batch_size=values.batch)
    print(f"{'drew' if is_new else 'already drawn:'} {values.num} drafts in {values.out}")


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "The base model's checkpoint.")
    flags.DEFINE_string("out", None, "Folder of the drafts.")
    flags.DEFINE_integer("num", 3500, "How many are drawn.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of prompts, texts and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.", lower_bound=1)
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
