"""What is wrong with a record that can be parsed: its images, and what they would cost."""

import functools
import json

import numpy as np

from data_pipelines import images
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.records import ImagePart, Limits, Record, parse_conversation
from data_pipelines.samples import check_flags, measure
from data_pipelines.tokenizer import Tokenizer


@functools.lru_cache(maxsize=1)
def open_tokenizer(path: str) -> Tokenizer:
    """A tokenizer's file, read once in each process."""
    return Tokenizer.from_file(path)


def group_of(config: DataConfig, mode: str) -> GroupConfig:
    """The group of a mode; one that the mixture does not name has the mixture's transforms."""
    return next((group for group in config.groups if mode in (group.folder, group.name)), GroupConfig(mode))


def limits_of(config: DataConfig) -> Limits:
    """What `config` lets a reader accept."""
    return Limits(config.unknown_role, config.max_text_chars, config.max_image_bytes)


def find_faults(record: Record, config: DataConfig, *, decode: bool = True) -> list[str]:
    """A sentence for everything that is wrong with an image.

    Args: decode reads the pixels; without, the header alone.
    """
    faults, read = [], images.decode_image if decode else images.image_size
    read_part = lambda part: read(part.data, where=part.place, max_pixels=config.max_image_pixels)
    for part in record.parts:
        for look in (check_flags, read_part) if isinstance(part, ImagePart) else ():
            try:
                look(part)
            except ValueError as error:
                faults.append(str(error))
    return faults


def read_conversation(text: str, *, mode: str, place: str, config: DataConfig,
                      decode: bool) -> tuple[Record | None, list[str]]:
    """The record of a row, or None and what is wrong with it."""
    try:
        record = parse_conversation(text, mode=mode, place=place, limits=limits_of(config))
    except ValueError as error:
        return None, [str(error)]
    faults = find_faults(record, config, decode=decode)
    return (None, faults) if faults else (record, [])


def measure_record(record: Record, config: DataConfig, tokenizer: Tokenizer, *,
                   group: GroupConfig) -> tuple[np.ndarray | None, list[str]]:
    """int32 [items, 5] as `samples.measure`, or None and what is wrong."""
    try:
        return measure(record, config, tokenizer, group=group), []
    except ValueError as error:
        return None, [str(error)]


def list_roles(text: str) -> list[str]:
    """The role of every part of a conversation that `parse_conversation` accepted."""
    roles: list[str] = []
    for turn in json.loads(text):
        if turn["role"] == "user":
            roles.append("user")
        elif turn["role"] == "assistant":
            roles += ["assistant"] * len(turn["content"])
    return roles
