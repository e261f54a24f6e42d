"""The pictures of a data set alone, for training an autoencoder."""

import pathlib
from collections.abc import Iterable

import numpy as np

from data_pipelines.images import decode_image
from data_pipelines.records import ImagePart, parse_conversation
from data_pipelines.sources import ParquetRows

MAX_PIXELS = 2**22


def load_pictures(folder: str | pathlib.Path, *, modes: Iterable[str], count: int) -> np.ndarray:
    """The first `count` pictures below <folder>/<mode>/*.parquet, modes in turn: uint8 [N, H, W, 3].

    Raises: ValueError if records are broken, there are too few, or sizes differ.
    """
    sources = {mode: ParquetRows(pathlib.Path(folder, mode)) for mode in sorted(modes)}
    pictures: list[np.ndarray] = []
    for index in range(max(map(len, sources.values()), default=0)):
        for mode, source in sources.items():
            if index >= len(source) or len(pictures) >= count:
                continue
            row = source[index]
            record = parse_conversation(row.text, mode=mode, place=row.place)
            pictures += [decode_image(part.data, where=row.place, max_pixels=MAX_PIXELS)
                         for part in record.parts if isinstance(part, ImagePart)]
    if len(pictures) < count:
        raise ValueError(f"{folder} holds {len(pictures)} pictures, {count} are wanted; build more records")
    if len({picture.shape for picture in pictures}) != 1:
        raise ValueError(f"{folder}: pictures differ in size; build them with one side")
    return np.stack(pictures[:count])
