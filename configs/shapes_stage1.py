"""IRGL stage 1 on the miniature: all six modes, from the base checkpoint.

    python -m irg_jax.train --config configs/shapes_stage1.py --workdir runs/shapes \
        --config.init_from=runs/shapes/base --config.data.source=runs/shapes/data

Expected (two CPU cores): see the table in README.md. `configs/shapes_stage1.py:quick` is cut short.
Groups, weights and dropout of images are the paper's; rate, schedule, budgets and dropout of texts (for
guidance, as BAGEL has it) are the miniature's, and so is an encoder that stays frozen in both stages: what it
knows of places is easily lost (configs/shapes_base.py); the original trains it. No group is mandatory: a pack
that holds one record of each of four is so long that attention, which is dense here, costs more than all the
rest.
"""

import ml_collections

GROUPS = {
    "initial_full": {"weight": 1.0},
    "improving_full": {"weight": 1.0},
    "initial_thinking_generation": {"weight": 0.5},
    "improving_thinking_generation": {"weight": 0.5},
    "initial_thinking_understanding": {"weight": 0.5},
    "improving_thinking_understanding": {"weight": 0.5},
}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full" or "quick"."""
    if size not in ("full", "quick"):
        raise ValueError(f"shapes_stage1 has the sizes full and quick, not {size!r}")
    steps = 600 if size == "full" else 4
    return ml_collections.ConfigDict({
        "stage": "stage1",
        "init_from": "runs/shapes/base",
        "total_steps": steps,
        "dtype": "float32",
        "remat": "none",
        "save_every": 100,
        "loss": {"timestep_shift": 4.0, "vae_batch": 16},
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": min(20, steps // 2), "eps": 1e-8,
                      "b2": 0.98, "ema_decay": 0.98,
                      "frozen": ("vit", "connector")},
        "data": {
            "source": "runs/shapes/data",
            "groups": GROUPS,
            "packs_per_step": 8 if size == "full" else 2,
            "text_tokens": 328, "vit_tokens": 48, "latent_tokens": 64, "images": 4,
            "max_tokens_per_record": 376,
            "text_dropout": 0.1,
            "vae_dropout": 0.3,
            "vae_transform": {"stride": 16, "max_size": 64, "min_size": 64},
            "vit_transform": {"stride": 14, "max_size": 56, "min_size": 56},
            "max_latent_size": 8, "vit_max_side": 8,
        },
    })
