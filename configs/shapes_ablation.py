"""Parts of IRGL alone, for as many steps as its two stages take together.

    python benchmarks/effect.py ablation --run runs/shapes

trains `:images` (prompt -> better image, nothing is thought) and `:trajectories` (both full modes, no
understanding and no reasoning alone), and prints their scores beside those of the base and of the whole.
"""

import ml_collections

from configs import shapes_stage1, shapes_stage2


def get_config(part: str) -> ml_collections.ConfigDict:
    """Args: part is "images" or "trajectories"."""
    if part not in ("images", "trajectories"):
        raise ValueError(f"shapes_ablation has the parts images and trajectories, not {part!r}")
    config = shapes_stage2.get_config()
    config.stage, config.init_from = part, "runs/shapes/base"
    config.total_steps += shapes_stage1.get_config().total_steps
    config.optimizer.warmup_steps = 20
    if part == "images":
        config.data.groups = ml_collections.ConfigDict({"text_to_image": {"weight": 1.0}})
        config.data.text_tokens, config.data.vit_tokens = 80, 0   # as many images, no thoughts
    return config
