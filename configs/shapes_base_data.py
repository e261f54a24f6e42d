"""What the miniature's base model is trained on: plain pictures, questions, short descriptions; no IRGL.

    python -m data_pipelines.build --config configs/shapes_base_data.py \
        --source shapes --format parquet --out runs/shapes_base/data

writes 16,000 records of three modes, none with a held-out combination.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 1,
        "side": 64,
        "counts": {"text_to_image": 9000, "description": 4000, "understanding": 3000},
        "num_heldout_prompts": 0,
    })
