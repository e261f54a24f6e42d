"""From the folders of drawn prompts to the files that an official scorer wants, and whether all are there."""

import os
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.digests import write_text
from data_pipelines.images import read_image
from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol

TOLD = 10         # missing names in a message
QUALITY = 95      # of a JPEG


def systems_of(num_turns: int) -> tuple[str, ...]:
    """What is scored: what is drawn without a thought, the only turn of a self-CoT model, or every turn."""
    if num_turns < 2:
        return (("plain", "self_cot")[num_turns],)
    return tuple(f"turn{turn}" for turn in range(1, num_turns + 1))


def sample_folder(samples: pathlib.Path, prompt: int, image: int, protocol: Protocol) -> pathlib.Path:
    """The folder of an image of a prompt, by their numbers."""
    return samples / f"{prompt * protocol.images + image:04d}"


def picture_of(folder: pathlib.Path, turn: int, *, may_stop: bool) -> pathlib.Path:
    """The image of a turn, from 1, in the folder of a drawn prompt; one that stopped stays with its last."""
    turns = [folder / f"turn{number}.png" for number in range(turn, 0, -1)]
    return next((path for path in turns if path.is_file()), turns[0]) if may_stop else turns[0]


def lay_out(protocol: Protocol, prompts: Sequence[Prompt], systems: Sequence[str], *, samples: pathlib.Path,
            official: pathlib.Path, may_stop: bool = False) -> None:
    """Writes what is not there yet. Raises: ValueError if a drawn image is missing or broken.

    Args: may_stop tells that trajectories may have fewer turns than systems.
    """
    for turn, system in enumerate(systems, 1):
        for number, prompt in enumerate(prompts):
            drawn = [picture_of(sample_folder(samples, number, image, protocol), turn, may_stop=may_stop)
                     for image in range(protocol.images)]
            paths = [official / path for path in protocol.paths(prompt, system)]
            for path, text in protocol.beside(prompt, system).items():
                if not (official / path).exists():
                    write_text(official / path, text)
            if all(path.exists() for path in paths):
                continue
            missing = [str(path) for path in drawn if not path.is_file()]
            if missing:
                raise ValueError(f"{missing[0]} is missing; draw it again (--checkpoint)")
            for path, pictures in zip(paths, [drawn] if len(paths) == 1 else [[each] for each in drawn]):
                _write(path, pictures)


def check_layout(protocol: Protocol, prompts: Sequence[Prompt], systems: Sequence[str],
                 official: pathlib.Path) -> None:
    """Raises: ValueError naming the images that are missing or empty."""
    wanted = [path for system in systems for prompt in prompts for path in protocol.paths(prompt, system)]
    missing = [path for path in wanted
               if not (official / path).is_file() or not (official / path).stat().st_size]
    if missing:
        rest = f" and {len(missing) - TOLD} more" if len(missing) > TOLD else ""
        raise ValueError(f"{official} lacks {len(missing)} of {len(wanted)} images of {protocol.title}: "
                         f"{', '.join(missing[:TOLD])}{rest}")


def make_grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Four uint8 [H, W, 3] -> [2 H, 2 W, 3], row by row."""
    rows = [np.concatenate(images[start:start + 2], axis=1) for start in (0, 2)]
    return np.concatenate(rows, axis=0)


def _write(path: pathlib.Path, pictures: Sequence[pathlib.Path]) -> None:
    """One file of one or four pictures; it takes its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    if path.suffix == ".png":
        try:
            os.link(pictures[0], partial)    # thousands of large files; a scorer only reads them
        except OSError:
            shutil.copyfile(pictures[0], partial)
    elif path.suffix == ".webp":
        grid = make_grid([read_image(picture) for picture in pictures])
        Image.fromarray(grid).save(partial, format="WEBP", lossless=True)
    else:
        Image.fromarray(read_image(pictures[0])).save(partial, format="JPEG", quality=QUALITY, subsampling=0)
    os.replace(partial, path)
