r"""Records of the six learning modes made from prompts, as IRGL's were: base model, painter, critic.

    python -m irg_jax.generate --config configs/irgl_generate.py --checkpoint BAGEL_CHECKPOINT --num_turns 1 \
        --config.system_prompt=@bagel_think_system_prompt.txt --prompts prompts.jsonl --out first_rounds
    python -m data_pipelines.curate --config configs/curate.py --out IRGL --estimate
    python -m data_pipelines.curate --config configs/curate.py --out IRGL

tells what it will ask and cost, asks, and writes IRGL/<mode>_learning/*.parquet, which configs/irgl_stage1.py
takes as its data.source. Names, addresses and prices below are to be replaced by yours. For 10,000 prompts
without images, each with a first round, the estimate is 10,000 images, 30,000 questions to the critic, 61
million tokens in and 6 million out; it takes two seconds.

Without any endpoint, the shapes world's renderer being the painter and its detector the critic:

    printf '%s\n' '{"prompt": "two red circles", "request": {"category": "counting", "groups":
        [{"shape": "circle", "count": 2, "colour": "red"}]}}' | tr -d '\n' > /tmp/shapes.jsonl
    python -m data_pipelines.curate --config configs/curate.py:shapes --config.prompts=/tmp/shapes.jsonl \
        --out /tmp/shapes

writes 3 records, one of each initial mode, in a second. With --config.sketcher.kind=folder and
--config.sketcher.folder=DIR, where `irg_jax.generate` drew the same prompts, it writes up to 6.
"""

import ml_collections


def get_config(kind: str = "endpoints") -> ml_collections.ConfigDict:
    """Args: kind is "endpoints" or "shapes"."""
    if kind not in ("endpoints", "shapes"):
        raise ValueError(f"curate has the kinds endpoints and shapes, not {kind!r}")
    if kind == "shapes":
        return ml_collections.ConfigDict({
            "prompts": "prompts.jsonl",
            "licence": "Apache-2.0",
            "suffix": "",
            "painter": {"kind": "shapes", "side": 64},
            "critic": {"kind": "shapes"},
            # Scenes are few and meant to recur, their pictures small, their texts short.
            "filters": {"min_side": 0, "near_bits": -1, "max_similarity": 1.0, "min_thought_chars": 1,
                        "min_reflection_chars": 1},
        })
    return ml_collections.ConfigDict({
        "prompts": "prompts.jsonl",
        "licence": "CC0-1.0",                 # of the prompts, where a line names none
        "sketcher": {"kind": "folder", "folder": "first_rounds"},
        "painter": {
            "kind": "endpoint",
            "size": "1024x1024",
            "endpoint": {"url": "https://api.openai.com/v1", "model": "gpt-image-1", "key": "OPENAI_API_KEY",
                         "price_image": 0.05, "budget": 600.0},
        },
        "critic": {
            "endpoint": {"url": "http://127.0.0.1:8000/v1", "model": "Qwen/Qwen2.5-VL-72B-Instruct",
                         "options": {"temperature": 0.3, "max_tokens": 2048}, "concurrency": 32},
        },
        "filters": {"min_quality": 6.0},
    })
