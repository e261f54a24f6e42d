"""What the miniature's base model is trained on: prompts, captions, questions, edits, text alone; no IRGL.

    python -m data_pipelines.build --config configs/shapes_base_data.py \
        --source shapes --format parquet --out runs/shapes_base/data

writes 216,000 records of eight modes, none with a held-out combination, in about three minutes.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 1,
        "side": 64,
        "counts": {"text_to_image": 40000, "description": 16000, "understanding": 16000, "editing": 24000,
                   "captioned": 24000, "captioning": 12000, "reading": 60000, "naming": 24000},
        "num_heldout_prompts": 0,
    })
