"""Small data sets of every kind of records."""

import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet

from data_cases import conversation, encode_image, write_rows
from data_pipelines.config import GroupConfig

KINDS = ("conversation", "text_to_image", "editing", "vision_language")


def picture(height: int, width: int) -> bytes:
    return encode_image(np.full((height, width, 3), 7, np.uint8))


def write_table(path: pathlib.Path, rows: dict[str, list], *, types: dict[str, pyarrow.DataType] | None = None,
                write_page_checksum: bool = True) -> None:
    types = types or {"image": pyarrow.binary(), "captions": pyarrow.string(),
                      "image_list": pyarrow.list_(pyarrow.binary()),
                      "instruction_list": pyarrow.list_(pyarrow.list_(pyarrow.string()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({name: pyarrow.array(values, types[name]) for name, values in rows.items()})
    pyarrow.parquet.write_table(table, path, row_group_size=2, write_page_checksum=write_page_checksum)


def write_kinds(source: pathlib.Path, *, count: int = 12) -> tuple[GroupConfig, ...]:
    """A group of each kind, named as its kind."""
    rng = np.random.default_rng(0)
    draw_picture = lambda: picture(*rng.integers(16, 60, 2))
    folders = {kind: source / "train" / kind for kind in KINDS}
    write_rows(folders["conversation"] / "a.parquet", [conversation(rng, "improving") for _ in range(count)])
    write_table(folders["text_to_image"] / "a.parquet", {
        "image": [draw_picture() for _ in range(count)],
        "captions": [json.dumps({"short": "red", "long": f"a red circle {i}"}) for i in range(count)]})
    lengths = rng.integers(2, 5, count).tolist()
    write_table(folders["editing"] / "a.parquet", {
        "image_list": [[draw_picture() for _ in range(length)] for length in lengths],
        "instruction_list": [[["red", "in red"]] * (length - 1) for length in lengths]})
    (folders["vision_language"] / "images").mkdir(parents=True)
    with open(folders["vision_language"] / "a.jsonl", "w") as file:
        for i in range(count):
            (folders["vision_language"] / "images" / f"{i}.png").write_bytes(draw_picture())
            turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": f"circle {i}"}]
            file.write(json.dumps({"image": f"{i}.png", "conversations": turns}) + "\n")
    return tuple(GroupConfig(kind, kind=kind) for kind in KINDS)
