"""What is where in a scene, as numbers: for training a vision encoder by itself.

Axes: N scenes, V cells of a grid by `side` x `side`, row by row. A cell shows the thing whose frame holds its
centre: things keep apart, so that is one at most, and every thing has a cell. A thing's labels are what texts
say of it, places and sizes in words included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from data_pipelines.shapes.language import PLACES, size_word, where
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, COUNTS, SHAPES, SIZES, TEXTURES, Scene, Thing

NOTHING = -1
KINDS = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": (*SIZES, None), "place": PLACES}
MOST = max(COUNTS)   # more of a shape are counted as so many


class Labels(NamedTuple):
    """Indices into BACKGROUNDS and, of each cell, into the values of KINDS; NOTHING in empty cells."""

    background: Int[np.ndarray, "N"]
    present: Bool[np.ndarray, "N shapes*colours"]  # in the order (shape, colour)
    count: Int[np.ndarray, "N shapes"]             # 0 to MOST
    cells: Int[np.ndarray, "N V kinds"]


def label(scenes: Sequence[Scene], *, side: int) -> Labels:
    """The labels of scenes on a grid of `side` by `side` cells."""
    num = len(scenes)
    background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes], np.int32)
    present = np.zeros((num, len(SHAPES) * len(COLOURS)), bool)
    count = np.zeros((num, len(SHAPES)), np.int32)
    cells = np.full((num, side * side, len(KINDS)), NOTHING, np.int32)
    centre = (np.arange(side) + 0.5) / side
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centre, centre, indexing="ij"))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            values = _describe(thing)
            present[row, values[0] * len(COLOURS) + values[1]] = True
            count[row, values[0]] = min(count[row, values[0]] + 1, MOST)
            held = np.maximum(abs(x - thing.x), abs(y - thing.y)) <= thing.size / 2
            cells[row, held] = values
    return Labels(background, present, count, cells)


def _describe(thing: Thing) -> list[int]:
    """Its index in each of KINDS."""
    said = (thing.shape, thing.colour, thing.texture, size_word(thing), where(thing))
    return [words.index(word) for words, word in zip(KINDS.values(), said)]
