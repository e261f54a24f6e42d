"""A few fixed prompts drawn while a model trains: always the same words and noise."""

import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image

from data_pipelines.system_prompts import load_system_prompt
from irg_jax.checkpoints.model import Model
from irg_jax.evaluation.drawing import image_grid
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.trajectory import Generator, Turn

_LONGEST = 320    # side of a picture in the grid, in pixels
_LABEL = 60       # letters of a prompt


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What is drawn, and how; `prompts` are few, for all are one batch."""

    prompts: tuple[str, ...]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("prompts are empty; give a few, or no samples at all")


class Samples:
    """FOLDER/step_<step>.png, a row a prompt and a column a turn, and the texts in step_<step>.json."""

    def __init__(self, config: SampleConfig, folder: pathlib.Path):
        self._config, self._folder = config, folder

    def check(self, model: Model) -> None:
        """Raises: ValueError if it cannot be drawn with such a model, whose `params` may be empty."""
        sampling = self._config.sampling
        load_system_prompt(sampling.system_prompt)
        Generator(dataclasses.replace(model, params={}), dataclasses.replace(sampling, system_prompt=""))

    def __call__(self, model: Model, step: int) -> Image.Image:
        config, folder = self._config, self._folder
        seeds = [config.seed + number for number in range(len(config.prompts))]
        turns = trajectories(Generator(model, config.sampling), config.prompts, seeds=seeds)
        grid = draw_grid(config.prompts, turns)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"step": step, "prompts": config.prompts, "seeds": seeds,
                  "turns": [[{"text": turn.text} for turn in each] for each in turns]}
        (folder / f"step_{step:06d}.json").write_text(json.dumps(record, indent=1) + "\n")
        grid.save(folder / f"step_{step:06d}.png")
        return grid


def draw_grid(prompts: tuple[str, ...], turns: list[tuple[Turn, ...]]) -> Image.Image:
    """A row a prompt, its turns from left to right, and white where it ended before others."""
    columns, height = max(map(len, turns)), turns[0][0].image.shape[0]
    labels = [label for prompt, each in zip(prompts, turns, strict=True)
              for label in [shorten(prompt), *(f"turn {number + 1}" if number < len(each) else ""
                                               for number in range(1, columns))]]
    images = [each[number].image if number < len(each) else np.full_like(each[0].image, 255)
              for each in turns for number in range(columns)]
    if height > _LONGEST:
        images = [image[::-(-height // _LONGEST), ::-(-height // _LONGEST)] for image in images]
    return image_grid(images, labels, columns, scale=max(1, 128 // height))


def shorten(prompt: str) -> str:
    return prompt if len(prompt) <= _LABEL else f"{prompt[:_LABEL - 3]}..."
