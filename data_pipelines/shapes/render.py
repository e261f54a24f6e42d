"""Scenes to pixels: flat colours, anti-aliased by drawing large and averaging."""

import functools

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.shapes.scene import Scene, Thing

SIDES = (64, 96)   # the smallest and the largest side
OVERSAMPLING = 6
STRIPES = 2.0      # dark stripes that cross a thing's frame along a row

# Two shades a colour: the fill, and the darker (for black, lighter) one of the stripes.
PALETTE = {
    "red": ((226, 48, 54), (150, 20, 34)),
    "orange": ((250, 138, 28), (182, 78, 4)),
    "yellow": ((252, 212, 36), (196, 146, 0)),
    "green": ((46, 168, 84), (16, 106, 50)),
    "blue": ((48, 104, 224), (20, 56, 148)),
    "purple": ((134, 70, 190), (84, 34, 130)),
    "pink": ((246, 124, 186), (190, 44, 118)),
    "black": ((36, 38, 46), (116, 120, 134)),
}
TINTS = {
    "white": (255, 255, 255),
    "grey": (221, 224, 228),
    "pale yellow": (255, 247, 205),
    "pale orange": (255, 228, 200),
    "pale pink": (255, 225, 234),
    "pale purple": (232, 222, 250),
    "pale blue": (212, 232, 252),
    "pale green": (214, 242, 216),
}


def render(scene: Scene, *, side: int = 64) -> np.ndarray:
    """The picture of a scene: uint8 [side, side, 3]. The same scene gives the same bytes."""
    if not SIDES[0] <= side <= SIDES[1] or side % 16:
        raise ValueError(f"side is {side}: choose a multiple of 16 from {SIDES[0]} to {SIDES[1]}")
    large = side * OVERSAMPLING
    canvas = Image.new("RGB", (large, large), TINTS[scene.background])
    for thing in scene.things:
        pixels = round(thing.size * large)
        corner = (round(thing.x * large - pixels / 2), round(thing.y * large - pixels / 2))
        canvas.paste(_fill(thing, pixels), corner, silhouette(thing.shape, pixels))
    return np.asarray(canvas.reduce(OVERSAMPLING))


def silhouette(shape: str, pixels: int) -> Image.Image:
    """The shape alone in its square frame: a mask of mode "L", 255 inside and 0 outside."""
    mask = Image.new("L", (pixels, pixels), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse(_box(pixels, 0.96), fill=255)
    if shape == "ring":
        draw.ellipse(_box(pixels, 0.48), fill=0)
    if shape in _outlines():
        draw.polygon([tuple((point + 1) / 2 * (pixels - 1)) for point in _outlines()[shape]],
                     fill=255)
    return mask


def _box(pixels: int, scale: float) -> tuple[float, float, float, float]:
    low, high = (1 - scale) / 2 * (pixels - 1), (1 + scale) / 2 * (pixels - 1)
    return low, low, high, high


@functools.cache
def _outlines() -> dict[str, np.ndarray]:
    """Corners [N, 2] as (x, y) in [-1, 1]. Each shape fills its frame to about the same area."""
    turn = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.46, 1.05)  # a fat star: thin arms are lost when small
    star = np.stack([reach * np.sin(turn), 0.08 - reach * np.cos(turn)], axis=1)
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    heart = np.stack([
        16 * np.sin(angle) ** 3,
        -13 * np.cos(angle) + 5 * np.cos(2 * angle) + 2 * np.cos(3 * angle) + np.cos(4 * angle),
    ], axis=1) / 16.5 - (0.0, 0.13)
    arm = 0.32
    quarter = np.array([(arm, -0.96), (arm, -arm), (0.96, -arm)])
    cross = np.concatenate([quarter @ _rotation(k) for k in range(4)])
    return {
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.84,
        "triangle": np.array([(0, -0.92), (1, 0.84), (-1, 0.84)]),
        "diamond": np.array([(0, -1), (0.94, 0), (0, 1), (-0.94, 0)]),
        "star": star,
        "cross": cross,
        "heart": heart,
    }


def _rotation(quarters: int) -> np.ndarray:
    return np.linalg.matrix_power(np.array([(0, 1), (-1, 0)]), quarters)


def _fill(thing: Thing, pixels: int) -> Image.Image:
    fill, shade = PALETTE[thing.colour]
    if thing.texture == "plain":
        return Image.new("RGB", (pixels, pixels), fill)
    row, column = np.mgrid[:pixels, :pixels] / pixels
    dark = ((row + column) * STRIPES + 0.25) % 1 < 0.5
    return Image.fromarray(np.where(dark[..., None], shade, fill).astype(np.uint8))
