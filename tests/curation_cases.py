"""Prompts, first rounds, and a server that answers as painter and critic: what curation is tested with."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.config import from_config_dict
from data_pipelines.curation.config import CurateConfig
from endpoint_cases import images_of, texts_of

HEADINGS = ("Detailed Explanation of Required Improvements:", "Step-by-Step Modification Guidance:",
            "Final Comprehensive Prompt for the Improved Image:")


def picture(key: str, *, side: int = 32) -> np.ndarray:
    """uint8 [side, side, 3], of its own for every key and no two alike."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def thought(key: str) -> str:
    return f"<think>The image will show {key}, large and in the middle, in soft light from the left.</think>"


def reflection(key: str, headings: tuple[str, ...] = HEADINGS) -> str:
    parts = (f"The image misses what matters about {key}: the light is flat and the edges are soft, and so on.",
             "- The light must come from the left, for the prompt asks for it.\n- The edges must be sharp.",
             "1. Move the light.\n2. Sharpen the edges.",
             f"{key}, large and in the middle, lit from the left, sharp.")
    told = "\n\n".join(f"### {heading}\n{part}" for heading, part in zip(headings, parts[1:]))
    return f"<think>{parts[0]}\n\n{told}</think>"


def answer(body: dict[str, Any]) -> str | np.ndarray:
    """Of a painter for a prompt; of a critic for one image or two; of a writer for none."""
    if "prompt" in body:
        return picture(f"better {body['prompt']}")
    text = texts_of(body)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    if "from 0 (useless)" in text:
        return "7.5"
    return (thought, thought, reflection)[len(images_of(body))](f"a thing called {key}")


def write_prompts(folder: pathlib.Path, num: int, *, num_pairs: int = 0) -> pathlib.Path:
    """`num` prompts without an image, then `num_pairs` with one."""
    (folder / "images").mkdir(parents=True)
    lines = [{"id": f"p{number:03d}", "prompt": f"prompt number {number}"} for number in range(num)]
    for number in range(num_pairs):
        name = f"images/{number}.png"
        Image.fromarray(picture(name)).save(folder / name)
        lines.append({"id": f"q{number:03d}", "prompt": f"pair number {number}", "image": name,
                      "licence": "CC-BY-4.0", "source": "made up"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_first_rounds(folder: pathlib.Path, prompts: list[str]) -> pathlib.Path:
    """As `irg_jax.generate` writes them."""
    for number, prompt in enumerate(prompts):
        home = folder / f"{number:04d}"
        home.mkdir(parents=True)
        (home / "turn1.txt").write_text(f"<think>First, {prompt}.</think>\n", encoding="utf-8")
        Image.fromarray(picture(f"first {prompt}")).save(home / "turn1.png")
        request = {"prompt": prompt, "seed": number, "num_turns": 1, "checkpoint": {"path": "base"},
                   "settings": {}}
        (home / "prompt.json").write_text(json.dumps(request), encoding="utf-8")
    return folder


def make_config(url: str, prompts: pathlib.Path, first_rounds: pathlib.Path | None = None, *,
                timeout: float = 5.0, **fields: Any) -> CurateConfig:
    """Painter and critic at one address; small images are good enough."""
    endpoint = {"url": url, "timeout": timeout, "concurrency": 6}
    values = {
        "prompts": str(prompts), "licence": "CC0-1.0",
        "critic": {"endpoint": {**endpoint, "model": "critic", "price_in": 1e4, "price_out": 1e5}},
        "painter": {"kind": "endpoint", "size": "32x32",
                    "endpoint": {**endpoint, "model": "painter", "price_image": 3.0}},
        "filters": {"min_side": 16}, "rows_per_file": 8, "rows_per_group": 4}
    if first_rounds:
        values["sketcher"] = {"kind": "folder", "folder": str(first_rounds)}
    return from_config_dict(CurateConfig, values | fields)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}
