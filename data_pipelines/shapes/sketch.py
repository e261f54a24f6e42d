"""Pictures as a hand, or a model, might draw them: outlines that wander, colours that are not even.

A model that edits only perfect pictures learns to copy them, pixel by pixel, and cannot make a clean shape of
a crooked one; but crooked ones are what it draws, and will be asked to improve.
"""

import numpy as np
from scipy import ndimage

KNOTS = 6           # of the random fields, along each side
WANDER = 0.028      # how far an outline goes astray, as a share of the image's side
SHADE = 0.05        # how much brighter or darker a place may be
BLUR = 0.012        # as a share of the side


def sketch(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A crooked version of a picture uint8 [S, S, 3]; how crooked is drawn anew each time."""
    side = picture.shape[0]
    strength = rng.uniform(0.3, 1.0)
    rows, columns, shade = (_smooth(rng, side) * strength for _ in range(3))
    y, x = np.mgrid[:side, :side]
    where = np.stack([y + rows * WANDER * side, x + columns * WANDER * side])
    drawn = np.stack([ndimage.map_coordinates(channel, where, order=1, mode="nearest")
                      for channel in np.moveaxis(picture.astype(np.float32), -1, 0)], axis=-1)
    drawn = ndimage.gaussian_filter(drawn, (BLUR * side * strength,) * 2 + (0,))
    return np.clip(np.rint(drawn * (1 + SHADE * 0.5 * shade[..., None])), 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A random field float [side, side] without sudden changes, about -2 to 2."""
    return ndimage.zoom(rng.normal(size=(KNOTS, KNOTS)), side / KNOTS, order=3)
