"""IRGL as the paper trains it: stage 1, then stage 2 from its EMA, as one job.

    python -m irg_jax.train --config configs/irgl.py --workdir RUN \
        --config.stages.stage1.init_from=BAGEL_CHECKPOINT --config.data.source=IRGL_300K

What is said of `config.data`, `config.mesh` and so on, beside `stages`, holds for both. Each stage's end is
drawn on the prompts below (RUN/<stage>/samples) and exported in the layout of the release (RUN/<stage>/export).
Never trained by us: no weights and no data set were published.
"""

import ml_collections

from configs import irgl_stage1, irgl_stage2

PROMPTS = (
    "a red apple to the left of two green pears on a wooden table",
    "a street sign that reads INTERLEAVE in the rain at night",
    "an origami crane on an open book, soft morning light",
    "three cats of different colours on a blue sofa",
)


def get_config() -> ml_collections.ConfigDict:
    both = {"samples": {"prompts": PROMPTS}, "draw_every": 1000, "export": "bagel"}
    return ml_collections.ConfigDict({
        "stages": {"stage1": {**irgl_stage1.get_config().to_dict(), **both},
                   "stage2": {**irgl_stage2.get_config().to_dict(), **both}}})
