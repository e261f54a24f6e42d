"""Pixels on the host: decode, resize, cut into patches. Everything stays uint8.

Image arrays are uint8 [H, W, 3]; the normalisation (x / 255 - 0.5) / 0.5 happens on the device.
"""

import io
import os
import pathlib
import struct
import warnings

import numpy as np
from einops import rearrange
from PIL import Image

from data_pipelines.config import ImageTransform

Image.init()
# Those whose header tells the size of what is decoded. Pillow knows more: EPS runs a program, and so may IPTC,
# which holds an image of any kind and size; ICO and ICNS decode theirs when they are opened.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I")   # grey of 16 bits; Pillow would clip them to 8
MAX_PIXELS = 200_000_000                       # of any image; callers may ask for less
_ORIENTATION = 0x0112                          # the EXIF tag; 1 is upright
_UPRIGHT = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))

# Pillow only warns between its limit and twice that; nobody reads a warning of a worker thread.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def target_size(width: int, height: int, transform: ImageTransform, *,
                num_images: int = 1) -> tuple[int, int]:
    """The size (width, height) an image is resized to, in pixels.

    Shrink to `max_size`, but never below `min_size`; round to the stride; then shrink to the pixels
    one of `num_images` may have, and to `max_size` again, which wins over `min_size`.

    Source: MaxLongEdgeMinShortEdgeResize of BAGEL's data/transforms.py.
    """
    scale = max(min(transform.max_size / max(width, height), 1.0),
                transform.min_size / min(width, height))
    width, height = _scaled(width, height, scale, transform.stride)
    max_pixels = transform.max_pixels / num_images
    if width * height > max_pixels:
        # The ratio of areas, taken as the scale of a side, as the original does. It shrinks more
        # than it has to, but a model trained that way expects those sizes.
        width, height = _scaled(width, height, max_pixels / (width * height), transform.stride)
    if max(width, height) > transform.max_size:
        width, height = _scaled(width, height, transform.max_size / max(width, height),
                                transform.stride)
    return width, height


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    return tuple(max(stride, round(round(side * scale) / stride) * stride)
                 for side in (width, height))


def resize(image: np.ndarray, transform: ImageTransform, *, num_images: int = 1) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3] of `target_size`, by Pillow's antialiased bicubic."""
    height, width = image.shape[:2]
    size = target_size(width, height, transform, num_images=num_images)
    if size == (width, height):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def patchify(image: np.ndarray, patch: int) -> np.ndarray:
    """[h * p, w * p, C] -> [h * w, p * p * C]: tokens row by row, (row, column, channel) within."""
    return rearrange(image, "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)


def write_patches(image: np.ndarray, patch: int, into: np.ndarray) -> None:
    """`patchify` into an array that is there already, without another copy of the pixels."""
    cells = rearrange(image, "(h p) (w q) c -> h w p q c", p=patch, q=patch)
    into.reshape(cells.shape)[...] = cells


def unpatchify(patches: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """[h * w, p * p * C] -> [h * p, w * p, C]: the inverse; height and width count patches."""
    return rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=height, w=width, p=patch, q=patch)


def grid_position(height: int, width: int, side: int) -> np.ndarray:
    """int32 [height * width]: row * side + column, the index into a side x side position table."""
    if height > side or width > side:
        raise ValueError(f"an image of {height} x {width} tokens does not fit the {side} x {side} "
                         "position table; lower max_size of its transform")
    return (np.arange(height)[:, None] * side + np.arange(width)).ravel().astype(np.int32)


def image_size(data: bytes, *, where: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) as `decode_image` makes it, from the header alone. Raises ValueError naming `where`."""
    with _open(data, where, max_pixels) as image:
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def decode_image(data: bytes, *, where: str, max_pixels: int) -> np.ndarray:
    """An encoded image -> uint8 [H, W, 3], upright by its EXIF orientation; transparency is laid over white.

    16-bit grey is scaled to 8 bits; of several frames the first is taken.

    Raises: ValueError naming `where` if the format is not one of FORMATS, the image has more than
        `max_pixels` (nothing is decoded then), or the data are truncated or broken.
    """
    with _open(data, where, max_pixels) as image:
        turn = _UPRIGHT.get(_orientation(image))
        try:
            image.load()
            upright = image if turn is None else image.transpose(turn)
            return _to_rgb(upright)
        except Exception as error:    # of any type: each of Pillow's decoders meets broken bytes in its own way
            raise ValueError(f"{where}: the image does not decode ({error})") from error


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The image of a file, as `decode_image` makes it. Raises: ValueError naming the file."""
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the image cannot be read ({error})") from error
    return decode_image(data, where=str(path), max_pixels=MAX_PIXELS)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in DEEP_MODES:
        grey = np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if "a" in image.mode.lower() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation in the header, 1 to 8; broken EXIF says nothing, and Pillow turns TIFF itself."""
    exif = Image.Exif()
    try:   # not `getexif`, which decodes a PNG to look behind its pixels
        exif.load(image.info.get("exif", b""))
        found = exif.get(_ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _open(data: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: image over the limit of {max_pixels} pixels") from error
    except Exception as error:    # of any type, like RuntimeError for AVIF
        raise ValueError(f"{where}: not a readable image ({', '.join(FORMATS)} are)") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{where}: image of {image.width} x {image.height} is over the limit of "
                         f"{max_pixels} pixels")
    if image.mode not in MODES + DEEP_MODES:
        raise ValueError(f"{where}: image mode {image.mode!r} is not supported; store 8-bit RGB")
    return image
