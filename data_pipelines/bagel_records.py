"""BAGEL's own three kinds of records: text to image, editing, and vision-language conversations.

    text_to_image     parquet  image: bytes              captions: '{"short": "a cat", "long": "..."}'
    editing           parquet  image_list: [bytes, ...]  instruction_list: [["make it red", ...], ...]
    vision_language   JSONL    {"image": "a.jpg" or [...], "conversations": [
                                   {"from": "human", "value": "<image>what is this?"},
                                   {"from": "gpt", "value": "a cat"}]}

Each becomes a `Record` of everything that may enter a sample of it; `choices` draws what does. As with
conversations, what cannot be read whole is refused by file, row and part.
"""

import re
from typing import Any

import numpy as np

from data_pipelines.lines import Folder
from data_pipelines.records import ImagePart, Limits, Record, TextPart, image_part, parse_json, text_part

IMAGE, VIDEO = "<image>", "<video>"
MAX_IMAGES = 64  # of a line; they share max_pixels, so more would be specks
MAX_FRAMES = 12  # of a video, evenly spaced; BAGEL's example draws 8 to 12 of them


def parse_text_to_image(image: Any, captions: Any, *, mode: str, place: str,
                        limits: Limits = Limits()) -> Record:
    """The captions, without loss, then the image to learn; a sample has one of the captions.

    Args:
        image: encoded bytes.
        captions: JSON object of named captions.
    Raises: ValueError naming place and part.
    Source: BAGEL's data/t2i_dataset.py.
    """
    where = f"{place}, captions"
    if not isinstance(captions, str):
        raise ValueError(f"{where}: they must be a JSON string, not {_type(captions)}")
    named = parse_json(captions, "value", place=where)
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{where}: they must be a JSON object of at least one caption")
    texts = [text_part(text, need_loss=False, place=f"{place}, caption {name!r}", limits=limits)
             for name, text in named.items()]
    picture = image_part(image, need_loss=True, place=f"{place}, image", limits=limits)
    return Record((*texts, picture), mode, place)


def parse_editing(image_list: Any, instruction_list: Any, *, mode: str, place: str,
                  limits: Limits = Limits()) -> Record:
    """Image 0, then for each edit its alternative instructions and the image it leads to.

    A sample is a chain of one or two edits: it begins with a clean image, ends with a noised one, and an
    image between is both. So the first image of the record is never noised, and the last never clean.

    Args:
        image_list: encoded bytes of two or more images.
        instruction_list: for each image but the first, the texts that describe the edit.
    Raises: ValueError naming place and part.
    Source: BAGEL's data/interleave_datasets/edit_dataset.py.
    """
    if not isinstance(image_list, list) or len(image_list) < 2:
        raise ValueError(f"{place}, image_list: an editing record needs a list of at least two images, not "
                         f"{_count(image_list, 'image')}")
    if not isinstance(instruction_list, list) or len(instruction_list) != len(image_list) - 1:
        raise ValueError(f"{place}, instruction_list: {len(image_list)} images need {len(image_list) - 1} "
                         f"lists of instructions, not {_count(instruction_list, 'list')}")
    parts: list[TextPart | ImagePart] = []
    for i, data in enumerate(image_list):
        if i:
            parts += _alternatives(instruction_list[i - 1], f"{place}, instruction {i - 1}", limits)
        is_seen = i < len(image_list) - 1
        parts.append(image_part(data, need_loss=i > 0, need_vae=is_seen, need_vit=is_seen,
                                place=f"{place}, image {i}", limits=limits))
    return Record(tuple(parts), mode, place)


def parse_vision_language(line: str | bytes, *, folder: Folder, mode: str, place: str,
                          limits: Limits = Limits()) -> Record:
    """Images for the ViT and the questions, without loss; the answers with it.

    A human's text is cut at its placeholders, and pieces that are blank are left out, as in the original.
    A video is a folder of frames or a list of them, at most MAX_FRAMES evenly spaced, each an image.

    Args:
        line: JSON object with `conversations` and perhaps `image` or `video`.
        folder: holds the images and frames.
    Raises: ValueError naming place and part; the original drops placeholders and images that do not match.
    Source: BAGEL's data/vlm_dataset.py.
    """
    value = parse_json(line, "line", place=place)
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a line must be a JSON object, not {_type(value)}")
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: conversations must be a list of at least one turn")
    pieces = []
    for i, turn in enumerate(turns):
        pieces += _parse_turn(turn, f"{place}, turn {i}", limits)
    paths = _image_paths(value, folder, place)
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"{place}: {len(paths)} images; a line may have {MAX_IMAGES}")
    # A video's frames stand where its one placeholder is; otherwise every image has its own.
    placeholder, wanted = (VIDEO, 1) if value.get("video") is not None else (IMAGE, len(paths))
    found = [piece for piece in pieces if piece in (IMAGE, VIDEO)]
    if found != [placeholder] * wanted:
        raise ValueError(f"{place}: {wanted} {placeholder} must stand in the human turns, not "
                         f"{found.count(IMAGE)} {IMAGE} and {found.count(VIDEO)} {VIDEO}")
    pictures = iter([image_part(folder.read(path, where=where, limit=limits.max_image_bytes), need_vit=True,
                                place=where, limits=limits) for where, path in paths])
    parts: list[TextPart | ImagePart] = []
    for piece in pieces:
        if piece == VIDEO:
            parts += pictures
        else:
            parts.append(next(pictures) if piece == IMAGE else piece)
    if not any(isinstance(part, TextPart) and part.need_loss for part in parts):
        raise ValueError(f"{place}: no turn is from gpt, so there is nothing to learn")
    return Record(tuple(parts), mode, place)


def _parse_turn(turn: Any, place: str, limits: Limits) -> list[TextPart | str]:
    """The texts of a turn, and its placeholders as they stand between them."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{place}: a turn must be an object with from and value")
    role, value = turn["from"], turn["value"]
    if role not in ("human", "gpt"):
        if limits.unknown_role == "ignore":
            return []
        raise ValueError(f"{place}: unknown role {role!r:.80}; use human or gpt, or set unknown_role "
                         "to 'ignore' to leave such turns out")
    text = text_part(value, need_loss=role == "gpt", place=place, limits=limits)
    pieces = re.split(f"({IMAGE}|{VIDEO})", value) if role == "human" else [value]
    if len(pieces) == 1:
        return [text]
    return [piece if piece in (IMAGE, VIDEO) else text._replace(text=piece.strip(), place=f"{place}, piece {i}")
            for i, piece in enumerate(pieces) if piece.strip()]


def _image_paths(value: dict[str, Any], folder: Folder, place: str) -> list[tuple[str, Any]]:
    """(place, path) of each image of a line, or of each frame that is taken of its video."""
    images, video = value.get("image"), value.get("video")
    if images is not None and video is not None:
        raise ValueError(f"{place}: image and video in one line; use two lines")
    what, paths = ("image", images) if video is None else ("frame", video)
    if isinstance(video, str):
        paths = folder.frames(video, where=f"{place}, video ({video!r:.80})")
    paths = [paths] if isinstance(paths, str) else [] if paths is None else paths
    if not isinstance(paths, list) or (video is not None and not paths):
        raise ValueError(f"{place}, {what}: expected a path or a list of paths, not {_type(paths)}")
    taken = range(len(paths))
    if video is not None:
        taken = np.linspace(0, len(paths) - 1, min(len(paths), MAX_FRAMES)).round().astype(int).tolist()
    return [(f"{place}, {what} {i} ({paths[i]!r:.80})", paths[i]) for i in taken]


def _alternatives(texts: Any, place: str, limits: Limits) -> list[TextPart]:
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{place}: an edit needs a list of at least one instruction, not "
                         f"{_count(texts, 'text')}")
    return [text_part(text, need_loss=False, place=f"{place}, alternative {i}", limits=limits)
            for i, text in enumerate(texts)]


def _count(value: Any, noun: str) -> str:
    return f"{len(value)} {noun}(s)" if isinstance(value, list) else _type(value)


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
