"""What is in a picture, from its pixels alone.

The background is the middle value of the border. Pixels unlike it (in Lab) form regions. A region's
shape is the template that covers it best after both are brought to the same centre and spread, so
size and place do not matter; its colour is the nearest line between the two shades of a colour.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage
from skimage import color, measure

from data_pipelines.shapes.render import PALETTE, STRIPES, TINTS, silhouette
from data_pipelines.shapes.scene import SHAPES

BLUR = 0.6            # pixels, against grain before regions are cut out
UNLIKE = 13.0         # Lab distance from the background at which a pixel may belong to a thing
SMALLEST = 0.12       # side of the smallest region looked at, as a fraction of the image side
LEAST_OVERLAP = 0.6   # intersection over union with the best template
LEAST_WAVE = 0.22     # amplitude of stripes, in units of the way from fill to stripe
FRAME = 32            # pixels; both region and template are resampled to this frame
FRAME_SPREAD = 9.0    # root mean square distance from the centre inside that frame


@dataclasses.dataclass(frozen=True)
class Detection:
    """One thing as seen: x, y and size are fractions of the image side, as in `Thing`.

    `box` is (left, top, right, bottom) in pixels, the last two exclusive; `overlap` in [0, 1] says
    how well the named shape covers the region.
    """

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    size: float
    box: tuple[int, int, int, int]
    overlap: float


def detect(image: np.ndarray) -> list[Detection]:
    """The things in a square picture uint8 [H, H, 3], from top to bottom."""
    return survey(image)[0]


def survey(image: np.ndarray) -> tuple[list[Detection], int]:
    """The things of `detect`, and the number of blobs: regions that are no thing, and that it leaves out."""
    lab = _smooth_lab(image)
    distance = np.linalg.norm(lab - _border_value(lab), axis=-1)
    labels = measure.label(distance > UNLIKE, connectivity=1)
    smallest = (SMALLEST * len(image)) ** 2
    found = [_describe(labels, region, lab, distance) for region in measure.regionprops(labels)
             if region.area >= smallest]
    things = sorted((thing for thing in found if thing.overlap >= LEAST_OVERLAP),
                    key=lambda thing: (thing.y, thing.x))
    return things, len(found) - len(things)


def detect_background(image: np.ndarray) -> str:
    """The name of the tint nearest to the picture's border, for uint8 [H, H, 3]."""
    names = list(TINTS)
    border = _border_value(_smooth_lab(image))
    distance = np.linalg.norm(_to_lab([TINTS[name] for name in names]) - border, axis=-1)
    return names[distance.argmin()]


def _describe(labels: np.ndarray, region, lab: np.ndarray, distance: np.ndarray) -> Detection:
    own = labels == region.label
    # One pixel more than the region, for its soft edge, but nothing of a neighbour.
    reach = ndimage.binary_dilation(own) & (own | (labels == 0))
    cover = np.where(reach, np.clip(distance / np.median(distance[own]), 0, 1), 0)
    centre, spread = _moments(cover)
    shape, overlap = _match(_to_frame(cover, centre, spread), spread)
    sharp = np.sqrt(max(spread ** 2 - 2 * BLUR ** 2, 1.0))
    unit_centre, unit_spread = _unit_moments(shape)
    size = sharp / unit_spread
    core = _core(own)
    colour = _name_colour(lab[core])
    wave = _stripe_wave(lab[core], colour, np.argwhere(core).sum(1) / size)
    texture = "striped" if wave > LEAST_WAVE else "plain"
    side = len(labels)
    y, x = (centre + 0.5 - size * unit_centre) / side
    top, left, bottom, right = region.bbox
    return Detection(shape, colour, texture, float(x), float(y), float(size / side),
                     (left, top, right, bottom), float(overlap))


def _moments(cover: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (row, column) and root mean square distance from it, of a picture of weights."""
    grid = np.indices(cover.shape)
    total = cover.sum()
    centre = (grid * cover).sum((1, 2)) / total
    square = ((grid - centre[:, None, None]) ** 2).sum(0)
    return centre, float(np.sqrt((square * cover).sum() / total))


def _to_frame(cover: np.ndarray, centre: np.ndarray, spread: float) -> np.ndarray:
    """The weights resampled so that their centre is the frame's and their spread FRAME_SPREAD."""
    scale = spread / FRAME_SPREAD
    offset = centre - scale * (FRAME - 1) / 2
    return ndimage.affine_transform(cover, (scale, scale), offset, (FRAME, FRAME), order=1)


def _match(framed: np.ndarray, spread: float) -> tuple[str, float]:
    """The best shape and its soft intersection over union.

    A small region is blurred more, measured in its own size, and so is its template.
    """
    blur = round(BLUR * FRAME_SPREAD / spread, 1)
    overlaps = {shape: np.minimum(framed, _template(shape, blur)).sum()
                / np.maximum(framed, _template(shape, blur)).sum() for shape in SHAPES}
    shape = max(overlaps, key=overlaps.get)
    return shape, overlaps[shape]


@functools.cache
def _template(shape: str, blur: float) -> np.ndarray:
    mask = np.pad(np.asarray(silhouette(shape, 256)) / 255, 64)
    return ndimage.gaussian_filter(_to_frame(mask, *_moments(mask)), blur)


@functools.cache
def _unit_moments(shape: str) -> tuple[np.ndarray, float]:
    """Centre (row, column) and spread of a shape in a frame of side 1, origin in the middle.

    They are needed because a triangle's centre of mass lies below the middle of its frame.
    """
    centre, spread = _moments(np.asarray(silhouette(shape, 256)) / 255)
    return (centre + 0.5) / 256 - 0.5, spread / 256


def _core(own: np.ndarray) -> np.ndarray:
    """The pixels of a region away from its edge, which the background has tinted."""
    core = ndimage.binary_erosion(own)
    return core if core.sum() >= 8 else own


def _name_colour(pixels: np.ndarray) -> str:
    """The colour of Lab pixels [N, 3]: plain or striped, they are mixtures of its two shades."""
    errors = {}
    for name, shades in PALETTE.items():
        fill, shade = _to_lab(shades)
        along = np.clip(_position(pixels, fill, shade), 0, 1)[:, None]
        errors[name] = np.linalg.norm(pixels - fill - along * (shade - fill), axis=-1).mean()
    return min(errors, key=errors.get)


def _stripe_wave(pixels: np.ndarray, colour: str, diagonal: np.ndarray) -> float:
    """How strongly Lab pixels [N, 3] alternate between the shades, at the stripes' own frequency.

    `diagonal` [N] is row + column in units of the thing's size. One frequency is asked for, not the
    variance, because grain and soft edges have variance too.
    """
    along = _position(pixels, *_to_lab(PALETTE[colour]))
    return 2 * abs(np.mean((along - along.mean()) * np.exp(2j * np.pi * STRIPES * diagonal)))


def _position(pixels: np.ndarray, fill: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """Where pixels [N, 3] lie on the line from fill (0) to shade (1)."""
    return (pixels - fill) @ (shade - fill) / np.sum((shade - fill) ** 2)


def _smooth_lab(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (*image.shape[:1] * 2, 3):
        raise ValueError(f"image is {image.dtype} {list(image.shape)}: give uint8 [H, H, 3]")
    return ndimage.gaussian_filter(color.rgb2lab(image), (BLUR, BLUR, 0), mode="nearest")


def _border_value(lab: np.ndarray) -> np.ndarray:
    border = np.ones(lab.shape[:2], bool)
    border[2:-2, 2:-2] = False
    return np.median(lab[border], axis=0)


def _to_lab(colours) -> np.ndarray:
    return color.rgb2lab(np.array(colours, np.uint8)[None])[0]
