"""How the miniature draws: IRG's settings at 64 pixels, but for texts.

    python -m irg_jax.generate --config configs/shapes_generate.py --checkpoint runs/shapes/stage2 \
        --prompt "two red circles left of a blue square" --out runs/shapes/generated

writes turn1.txt, turn1.png, turn2.txt, turn2.png and trajectory.png in about half a minute, most of
it compilation. `configs/shapes_generate.py:quick` takes fewer steps.
"""

import ml_collections


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full" or "quick"."""
    if size not in ("full", "quick"):
        raise ValueError(f"shapes_generate has the sizes full and quick, not {size!r}")
    num_timesteps = 25 if size == "full" else 9  # the paper takes 50
    return ml_collections.ConfigDict({
        "turn1": {
            "num_timesteps": num_timesteps,
            "timestep_shift": 3.0,
            "cfg_text_scale": 4.0,
            "cfg_img_scale": 1.0,
            "cfg_interval": (0.4, 1.0),
            "cfg_renorm_type": "global",
            "cfg_renorm_min": 0.0,
        },
        "turn2": {  # and every later turn
            "num_timesteps": num_timesteps,
            "timestep_shift": 3.0,
            "cfg_text_scale": 2.0,     # the paper's text; its code's 4.0 mends less here: see docs/log.md
            "cfg_img_scale": 2.0,
            "cfg_interval": (0.0, 1.0),
            "cfg_renorm_type": "text_channel",
            "cfg_renorm_min": 0.0,
        },
        # The likeliest tokens, as BAGEL's default is: IRG's temperature of 0.3 cost 6 of 100 first thoughts
        # and 10 of 100 first pictures (docs/log.md, 2026-11-26).
        "text": {"max_length": 256, "do_sample": False},
        "height": 64,
        "width": 64,
        "num_turns": 2,
        # The sentence that every record with a think text begins with.
        "system_prompt": "plan the picture in think tags, draw it, then look again and improve it.",
        "vae_transform": {"stride": 16, "max_size": 64, "min_size": 64},
        "vit_transform": {"stride": 14, "max_size": 56, "min_size": 56},
        "posterior": "sample",
        "dtype": "float32",
        "batch_size": 50,     # prompts drawn at once
        "text_multiple": 32,      # larger ones compile less and read more
        "cache_multiple": 128,
    })
