"""What is kept of an image's pixels once they were decoded: its size, a small grey picture, a fingerprint."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

COMPARED_SIDE = 64    # pixels of the greys whose similarity is measured
PRINT_SIDE = 8        # fingerprints: 8 x 8 bits


class Look(NamedTuple):
    """Of one image; decoding it again takes longer than all that is asked of this."""

    height: int
    width: int
    grey: np.ndarray      # uint8 [COMPARED_SIDE, COMPARED_SIDE]
    fingerprint: int      # 64 bits


def look_at(pixels: np.ndarray) -> Look:
    """Of an image uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    return Look(height, width, _grey(pixels, COMPARED_SIDE, COMPARED_SIDE), _fingerprint(pixels))


def measure_similarity(one: Look, other: Look) -> float:
    """Structural similarity of the greys of two images of any sizes: 1 if they are equal."""
    return float(structural_similarity(one.grey, other.grey, data_range=255))


def _fingerprint(pixels: np.ndarray) -> int:
    """Where an image becomes brighter from left to right (a difference hash)."""
    grey = _grey(pixels, PRINT_SIDE + 1, PRINT_SIDE).astype(int)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def _grey(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [height, width]."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((width, height), Image.Resampling.BOX))
