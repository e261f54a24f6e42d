"""IRGL stage 1 on the miniature: all six modes, from the base checkpoint.

    python -m irg_jax.train --config configs/shapes_stage1.py --workdir runs/shapes \
        --config.init_from=runs/shapes/base --config.data.source=runs/shapes/data

Expected (two CPU cores): see the table in README.md. `configs/shapes_stage1.py:quick` is cut short.
Groups, weights, mandatory groups and dropout are the paper's; rate, schedule and budgets are the miniature's.
"""

import ml_collections

GROUPS = {
    "initial_full": {"weight": 1.0, "is_mandatory": True},
    "improving_full": {"weight": 1.0, "is_mandatory": True},
    "initial_thinking_generation": {"weight": 0.5, "is_mandatory": True},
    "improving_thinking_generation": {"weight": 0.5, "is_mandatory": True},
    "initial_thinking_understanding": {"weight": 0.5, "is_mandatory": False},
    "improving_thinking_understanding": {"weight": 0.5, "is_mandatory": False},
}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full" or "quick"."""
    if size not in ("full", "quick"):
        raise ValueError(f"shapes_stage1 has the sizes full and quick, not {size!r}")
    steps = 40 if size == "full" else 4
    return ml_collections.ConfigDict({
        "stage": "stage1",
        "init_from": "runs/shapes/base",
        "total_steps": steps,
        "dtype": "float32",
        "remat": False,
        "save_every": 50,
        "loss": {"timestep_shift": 1.5, "vae_batch": 16},
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": min(10, steps // 2), "eps": 1e-8,
                      "ema_decay": 0.97},
        "data": {
            "source": "runs/shapes/data",
            "groups": GROUPS,
            "packs_per_step": 4 if size == "full" else 2,
            "text_tokens": 768, "vit_tokens": 96, "latent_tokens": 144, "images": 9,
            "max_tokens_per_record": 768,
            "vae_dropout": 0.3,
            "vae_transform": {"stride": 16, "max_size": 64, "min_size": 64},
            "vit_transform": {"stride": 14, "max_size": 56, "min_size": 56},
            "max_latent_size": 8, "vit_max_side": 8,
        },
    })
