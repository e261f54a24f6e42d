"""IRGL stage 2 on the miniature: the two full modes, from stage 1's EMA.

    python -m irg_jax.train --config configs/shapes_stage2.py --workdir runs/shapes \
        --config.data.source=runs/shapes/data

Expected (two CPU cores): see the table in README.md. `configs/shapes_stage2.py:quick` is cut short.
"""

import ml_collections


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full" or "quick"."""
    if size not in ("full", "quick"):
        raise ValueError(f"shapes_stage2 has the sizes full and quick, not {size!r}")
    steps = 1100 if size == "full" else 4
    return ml_collections.ConfigDict({
        "stage": "stage2",
        "init_from": "stage1:ema",
        "total_steps": steps,
        "dtype": "float32",
        "remat": "none",
        "save_every": 100,
        "loss": {"timestep_shift": 4.0, "vae_batch": 16},
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": 0, "schedule": "cosine", "eps": 1e-8,
                      "b2": 0.98, "ema_decay": 0.98,
                      "frozen": ("vit", "connector")},
        "data": {
            "source": "runs/shapes/data",
            "groups": {"initial_full": {"weight": 1.0, "is_mandatory": True},
                       "improving_full": {"weight": 1.0, "is_mandatory": True}},
            "packs_per_step": 8 if size == "full" else 2,
            "text_tokens": 344, "vit_tokens": 32, "latent_tokens": 80, "images": 5,
            "max_tokens_per_record": 504,
            "text_dropout": 0.1,
            "vae_dropout": 0.3,
            "vae_transform": {"stride": 16, "max_size": 64, "min_size": 64},
            "vit_transform": {"stride": 14, "max_size": 56, "min_size": 56},
            "max_latent_size": 8, "vit_max_side": 8,
        },
    })
