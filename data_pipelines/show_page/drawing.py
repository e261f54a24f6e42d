"""Pixels and rasters for the page: small, embedded, and legible on light and dark paper."""

import base64
import io

import numpy as np
from PIL import Image

from data_pipelines.batch import Rows, visible

PICTURE_SIDE = 224  # pixels; larger pictures are shrunk to it
CELLS = 160         # a raster has at most so many cells a side
DETAIL = 4          # tokens a side of each cell at which the rule is evaluated


def embed_picture(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI, at most PICTURE_SIDE pixels a side.

    The bytes are always ours: what a data set holds is decoded, never passed on.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    if max(picture.size) <= 96:
        return _embed(picture, "PNG", optimize=True)
    return _embed(picture, "JPEG", quality=82)


def embed_raster(shares: np.ndarray, colors: np.ndarray) -> str:
    """A raster as a PNG: each column in the colour of its keys, as opaque as the share it is seen.

    Args: shares float [M, M] in [0, 1], colors uint8 [M, 3].
    """
    # A cell of which anything is seen is inked, a sixth at least.
    alpha = np.where(shares > 0, np.maximum(np.round(255 * shares), 42), 0).astype(np.uint8)
    pixels = np.broadcast_to(colors, (len(shares), *colors.shape))
    return _embed(Image.fromarray(np.dstack([pixels, alpha])), "PNG", optimize=True)


def visibility(rows: Rows) -> np.ndarray:
    """Who sees whom, in brief: float [M, M], the share of pairs that see each other in each cell.

    Args: rows of the tokens to draw, [S] each, by ascending order and without padding.
    Cell (i, j) holds the queries and keys number `cell_edges(S)[i]` to `[i + 1]` and `[j]` to
    `[j + 1]`. The rule is evaluated at DETAIL x DETAIL pairs a cell, so the work does not grow with
    the pack; with at most CELLS * DETAIL tokens the shares are exact.
    """
    count = len(rows.order)
    edges = cell_edges(count)
    chosen = np.unique(np.linspace(0, count - 1, min(count, CELLS * DETAIL)).round().astype(int))
    seen = visible(*[Rows(*(row[chosen] for row in rows))] * 2).astype(float)
    starts = np.searchsorted(chosen, edges[:-1])
    sums = np.add.reduceat(np.add.reduceat(seen, starts, axis=0), starts, axis=1)
    sizes = np.diff([*starts, len(chosen)])
    return sums / np.outer(sizes, sizes)


def cell_edges(count: int) -> np.ndarray:
    """int [M + 1]: the tokens at which the cells of a raster over `count` tokens begin; the last is `count`."""
    return np.linspace(0, count, min(count, CELLS) + 1).round().astype(int)


def draw_histogram(values: np.ndarray, high: float, *, bins: int = 30) -> str:
    """SVG points of a filled outline in a box of 100 x 24, over [0, high]; the tallest bin touches the top."""
    counts, _ = np.histogram(np.minimum(values, high), bins=bins, range=(0, high or 1))
    tops = 24 - 23 * counts / max(counts.max(), 1)
    width = 100 / bins
    points = [(0.0, 24.0)]
    for number, top in enumerate(tops):
        points += [(number * width, top), ((number + 1) * width, top)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in [*points, (100.0, 24.0)])


def _embed(picture: Image.Image, format: str, **options) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
