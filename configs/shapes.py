"""IRGL on the miniature: both stages as one job, drawn every 100 steps and exported at the end of each.

    python -m irg_jax.train --config configs/shapes.py --workdir runs/both \
        --config.stages.stage1.init_from=runs/shapes/base --config.data.source=runs/shapes/data

Expected (two CPU cores): about half an hour; RUN/<stage>/samples shows four prompts getting better. The size
quick, as in `configs/shapes.py:quick`, is cut short.
"""

import ml_collections

from configs import shapes_generate, shapes_stage1, shapes_stage2

PROMPTS = ("two red circles", "a blue square above a green triangle", "three yellow rings",
           "a large purple star left of a small orange diamond")


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full" or "quick"."""
    sampling = shapes_generate.get_config(size).to_dict()
    both = {"samples": {"prompts": PROMPTS, "sampling": sampling}, "draw_every": 100, "export": "bagel"}
    return ml_collections.ConfigDict({
        "stages": {"stage1": {**shapes_stage1.get_config(size).to_dict(), **both},
                   "stage2": {**shapes_stage2.get_config(size).to_dict(), **both}}})
