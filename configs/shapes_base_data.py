"""What the miniature's base model is trained on: prompts, captions, questions, edits, text alone; no IRGL.

    python -m data_pipelines.build --config configs/shapes_base_data.py \
        --source shapes --format parquet --out runs/shapes_base/data

writes 294,000 records of twelve modes, none with a held-out combination, in about five minutes of two cores.
`configs/shapes_base_data.py:own` has fewer of them, and edits of the drafts that --config.drafts names.
"""

import ml_collections


def get_config(part: str = "all") -> ml_collections.ConfigDict:
    """Args: part is "all" or "own"."""
    if part not in ("all", "own"):
        raise ValueError(f"shapes_base_data has the parts all and own, not {part!r}")
    counts = {"text_to_image": 40000, "description": 16000, "understanding": 16000, "editing": 24000,
              "captioned": 24000, "medley": 24000, "captioning": 12000, "reading": 60000,
              "naming": 24000, "verifying": 14000, "comparing": 30000, "rephrasing": 10000}
    if part == "own":
        counts = {name: count // 4 for name, count in counts.items()} | {
            "captioned": 16000, "medley": 24000, "mending": 14000, "reviewing": 14000}
    return ml_collections.ConfigDict({
        "seed": 1,
        "side": 64,
        "counts": counts,
        "num_heldout_prompts": 0,
    })
