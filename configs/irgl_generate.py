"""How the released model draws: IRG's published settings, two turns at 1024 x 1024 in bfloat16.

    python -m irg_jax.generate --config configs/irgl_generate.py --checkpoint CHECKPOINT \
        --config.system_prompt=@irg_system_prompt.txt --prompt "a glass of water on a red book" --out drawings

writes a folder a prompt: both think texts, both images, and all of it in one picture. CHECKPOINT is what
irg_jax.convert made of the released folder, and the file holds the system prompt that its weights were trained
with, which is not reprinted here. 29 GiB of weights and contexts; 16.1 PFLOP a prompt, of which no device has
drawn one yet (docs/performance.md, "Drawing and writing at full size").
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "turn1": {
            "num_timesteps": 50,
            "timestep_shift": 3.0,
            "cfg_text_scale": 4.0,
            "cfg_img_scale": 1.0,
            "cfg_interval": (0.4, 1.0),
            "cfg_renorm_type": "global",
            "cfg_renorm_min": 0.0,
        },
        "turn2": {  # and every later turn
            "num_timesteps": 50,
            "timestep_shift": 3.0,
            "cfg_text_scale": 4.0,
            "cfg_img_scale": 2.0,
            "cfg_interval": (0.0, 1.0),
            "cfg_renorm_type": "text_channel",
            "cfg_renorm_min": 0.0,
        },
        "text": {"max_length": 4096, "do_sample": True, "temperature": 0.3},
        "height": 1024,
        "width": 1024,
        "num_turns": 2,
        "system_prompt": "",
        "dtype": "bfloat16",
        "batch_size": 1,
        # Two turns have about 10,000 tokens: few sizes of the cache, so few compilations.
        "text_multiple": 256,
        "cache_multiple": 2048,
    })
