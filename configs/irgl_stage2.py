"""IRGL stage 2 of the paper, for BAGEL-7B-MoT on a pod: the two full modes, 30,000 steps, from stage 1's EMA.

    python -m irg_jax.train --config configs/irgl_stage2.py --workdir RUN --config.data.source=IRGL_300K

Values are the released run.sh and yaml, but for the sizes of the streams: see stage 1.
Never trained by us: BAGEL's weights are public, IRG's and IRGL-300K were not when this was written.
"""

import ml_collections

from configs.irgl_stage1 import SEEING, TOPOLOGIES


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "stage": "stage2",
        "init_from": "stage1:ema",
        "total_steps": 30000,
        "save_every": 1000,
        "loss": {"timestep_shift": 4.0, "posterior": "sample"},
        "optimizer": {"learning_rate": 2e-5, "warmup_steps": 0, "eps": 1e-15, "ema_decay": 0.995},
        "topologies": TOPOLOGIES,
        **SEEING,
        "data": {
            "source": "IRGL-300K",
            "split": "",
            "groups": {"initial_full_learning": {"weight": 1.0, "is_mandatory": True},
                       "improving_full_learning": {"weight": 1.0, "is_mandatory": True}},
            "packs_per_step": 8,
            "text_tokens": 2048, "vit_tokens": 9856, "latent_tokens": 20608, "images": 6,
            "vae_dropout": 0.3,
        },
    })
