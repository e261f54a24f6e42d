"""IRGL as the paper trains it: stage 1, then stage 2 from its EMA, as one job.

    python -m irg_jax.train --config configs/irgl.py --workdir RUN \
        --config.stages.stage1.init_from=BAGEL_CHECKPOINT --config.data.source=IRGL_300K

What is said of `config.data`, `config.mesh` and so on, beside `stages`, holds for both. Each stage is drawn and
exported as its own config says.
Never trained by us: BAGEL's weights are public, IRG's and IRGL-300K were not when this was written.
"""

import ml_collections

from configs import irgl_stage1, irgl_stage2


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "stages": {"stage1": irgl_stage1.get_config(), "stage2": irgl_stage2.get_config()}})
