"""IRGL records of the shapes world: all six modes, and the prompts held out for evaluation.

    python -m data_pipelines.build --config configs/shapes_data.py --source shapes --format parquet \
        --out runs/shapes/data --config.drafts=runs/shapes/drafts

writes train/<mode>/*.parquet (16,800 records), prompts_heldout.jsonl (300 prompts) and manifest.json in less
than a minute. The first images of improving records are the drafts of `python -m irg_jax.draft`; without
--config.drafts they are rendered, each with one flaw.
`configs/shapes_data.py:quick` is the same, cut short; `:images` holds only prompts and right images, 8,000 of
them, for the ablation.
"""

import ml_collections


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Args: size is "full", "quick" or "images"."""
    if size not in ("full", "quick", "images"):
        raise ValueError(f"shapes_data has the sizes full, quick and images, not {size!r}")
    if size == "images":
        return ml_collections.ConfigDict({"seed": 0, "side": 64, "counts": {"text_to_image": 8000},
                                          "num_heldout_prompts": 0})
    initial, improving = (8000, 4000) if size == "full" else (96, 96)
    reasoning = 1200 if size == "full" else 48
    return ml_collections.ConfigDict({
        "seed": 0,
        "side": 64,  # pixels of the square images
        "counts": {  # records of each mode
            "initial_full": initial,      # new ones: else drawing, learnt from 100 times as many, wears off
            "improving_full": improving,
            "initial_thinking_generation": reasoning,
            "initial_thinking_understanding": reasoning,
            "improving_thinking_generation": reasoning,
            "improving_thinking_understanding": reasoning,
        },
        "num_heldout_prompts": 300 if size == "full" else 24,
    })
