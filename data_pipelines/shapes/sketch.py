"""Pictures as a hand, or a model, might draw them: outlines that wander, colours that are not even; scrawls.

A model that edits only perfect pictures learns to copy them, pixel by pixel, and cannot make a clean shape of
a crooked one; but crooked ones are what it draws, and will be asked to improve.
"""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from data_pipelines.shapes.render import OVERSAMPLING

KNOTS = 6           # of the random fields, along each side
WANDER = 0.028      # how far an outline goes astray, as a share of the image's side
SHADE = 0.05        # how much brighter or darker a place may be
BLUR = 0.012        # as a share of the side
PATCHES = (1, 4)    # of a scrawl, as are the corners
CORNERS = (4, 9)


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


def scrawl(rng: np.random.Generator, side: int) -> np.ndarray:
    """A picture of nothing that has a name, uint8 [side, side, 3]: patches of any outline on a pale ground."""
    large = side * OVERSAMPLING
    canvas = Image.new("RGB", (large, large), _colour(rng, 200, 256))
    for _ in range(rng.integers(*PATCHES, endpoint=True)):
        num = rng.integers(*CORNERS, endpoint=True)
        turns = (np.arange(num) + rng.uniform(0, 1, num)) * 2 * np.pi / num
        reach = rng.uniform(0.4, 1.0, num) * rng.uniform(0.12, 0.3)
        points = rng.uniform(0.2, 0.8, 2) + reach[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        ImageDraw.Draw(canvas).polygon(list(map(tuple, points * large)), fill=_colour(rng, 0, 256))
    return np.asarray(canvas.reduce(OVERSAMPLING))


def _colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.integers(low, high, size=3).tolist())


def _smooth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A random field float [side, side] without sudden changes, about -2 to 2."""
    return ndimage.zoom(rng.normal(size=(KNOTS, KNOTS)), side / KNOTS, order=3)
