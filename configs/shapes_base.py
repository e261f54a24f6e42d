"""The miniature's base checkpoint, standing for BAGEL-7B-MoT: tokenizer, autoencoder, network.

    python -m irg_jax.make_base --config configs/shapes_base.py \
        --workdir runs/shapes_base --out runs/shapes_base/export

builds the data set (2 minutes), trains a tokenizer and the autoencoder (15 minutes on two idle cores), computes
moments (5 minutes), trains the network on plain text-to-image, understanding, short descriptions and editing
(no reflection, no IRGL; an hour), and exports in the released layout in bf16. Interrupted, the same command
resumes. The rate is constant and the EMA long, so a longer run begins like this one.

Expected: self-CoT draws 20 % of 1,000 training prompts right (`irg_jax.draft`), 19 % of the held-out ones
plainly; 32 % of 600 questions about scenes are answered right (`irg_jax.examine`).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "data_config": "configs/shapes_base_data.py",
        "vocab_size": 512,
        "llm": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5,
                "num_attention_heads": 4, "num_key_value_heads": 2},
        "vit": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
                "num_attention_heads": 4},
        "vae": {"ch": 32, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 1, "z_channels": 12},
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 8,
        "autoencoder": {
            "total_steps": 5000,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "kl_weight": 3e-5,
            "crop": 32, "full_steps": 1000,
            "num_images": 12000,
            "save_every": 200,
            "seed": 0,
        },
        "train": {
            "stage": "base",
            "init_from": "initial",          # written by make_base: fresh weights, trained autoencoder
            "total_steps": 6000,
            "dtype": "float32",
            "remat": False,
            "save_every": 250,
            "loss": {"timestep_shift": 1.5, "vae_batch": 32},
            "optimizer": {"learning_rate": 1.5e-3, "warmup_steps": 200, "eps": 1e-8, "b2": 0.98,
                          "ema_decay": 0.9985},
            "data": {
                "source": "data",            # below the workdir
                "moments": "moments",        # below the workdir; computed before the first step
                "groups": {"text_to_image": {"weight": 3.0}, "description": {"weight": 1.5},
                           "understanding": {"weight": 1.0}, "editing": {"weight": 1.0}},
                "packs_per_step": 28,        # of about three records; small packs keep attention cheap
                "text_tokens": 72, "vit_tokens": 16, "latent_tokens": 48, "images": 3,
                "max_tokens_per_record": 136,
                "text_dropout": 0.1, "vit_dropout": 0.05, "vae_dropout": 0.2,
                "vae_transform": {"stride": 16, "max_size": 64, "min_size": 64},
                "vit_transform": {"stride": 14, "max_size": 56, "min_size": 56},
                "max_latent_size": 8, "vit_max_side": 8,
            },
        },
    })
