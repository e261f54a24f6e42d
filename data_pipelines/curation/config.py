"""Settings of `data_pipelines.curate`."""

import dataclasses
import re
from typing import Literal

from data_pipelines.curation.compose import MODES
from data_pipelines.endpoints import EndpointConfig
from data_pipelines.records import Limits

MAX_CHARS = Limits().max_text_chars - 1000    # readers refuse longer texts, tags and headings included


def _require(config: object, name: str, *, when: bool) -> None:
    if when and not getattr(config, name):
        raise ValueError(f"{name} is missing, but kind is {config.kind!r}; set it, or another kind")


def _check_size(size: str) -> None:
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
        raise ValueError(f"size is {size!r}; write it like 1024x1024")


@dataclasses.dataclass(frozen=True)
class SketcherConfig:
    """Where first rounds come from: the base model's own thoughts and images, the ones to be improved."""

    kind: Literal["none", "folder", "endpoint"] = "none"
    folder: str = ""                        # of irg_jax.generate; matched by prompt
    # Of the image; irg_jax.serve with options {"num_turns": 1} thinks first, and tells it as `revised_prompt`.
    painter: EndpointConfig | None = None
    writer: EndpointConfig | None = None    # of the thought, if it does not come with the image
    size: str = "1024x1024"

    def __post_init__(self):
        _require(self, "folder", when=self.kind == "folder")
        _require(self, "painter", when=self.kind == "endpoint")
        _check_size(self.size)


@dataclasses.dataclass(frozen=True)
class PainterConfig:
    """Who makes the better image of a prompt that brings none."""

    kind: Literal["none", "folder", "endpoint", "shapes"] = "none"
    folder: str = ""                        # holds <id>.png, .jpg, .jpeg or .webp
    endpoint: EndpointConfig | None = None
    size: str = "1024x1024"
    side: int = 64                          # of the shapes renderer, in pixels

    def __post_init__(self):
        _require(self, "folder", when=self.kind == "folder")
        _require(self, "endpoint", when=self.kind == "endpoint")
        _check_size(self.size)
        if self.side <= 0:
            raise ValueError(f"side is {self.side}; it must be positive")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """Who looks, thinks and reflects."""

    kind: Literal["endpoint", "folder", "shapes"] = "endpoint"
    folder: str = ""                        # holds <id>.thought.txt, .reflection.txt, .quality.txt
    endpoint: EndpointConfig | None = None
    max_side: int = 1024                    # larger images are shown smaller: they cost tokens

    def __post_init__(self):
        _require(self, "folder", when=self.kind == "folder")
        _require(self, "endpoint", when=self.kind == "endpoint")
        if self.max_side <= 0:
            raise ValueError(f"max_side is {self.max_side}; it must be positive")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What is not taken. Lengths count characters without think tags and headings."""

    max_prompt_chars: int = 4000
    min_thought_chars: int = 40
    max_thought_chars: int = 8000
    min_reflection_chars: int = 200
    max_reflection_chars: int = 12_000
    min_side: int = 256            # pixels of the shorter side of any image
    min_similarity: float = -1.0   # of first and better image, from -1 to 1 (structural, greys of 64 x 64)
    max_similarity: float = 0.98   # above, there is nothing to be learnt
    min_quality: float = 0.0       # of the better image, 0 to 10 by the critic; 0: it is not asked
    near_bits: int = 4             # images whose fingerprints differ in so few of 64 bits are one; -1: off
    # Regular expressions, without regard to case. A thought comes before any image; a reflection knows one.
    forbidden_in_thought: tuple[str, ...] = (
        r"\b(?:given|provided|attached|uploaded|reference|original) (?:image|picture|photo)\b",
        r"\b(?:this|the) (?:image|picture|photo) (?:shows|depicts|features|presents|captures|displays)\b",
        r"\b(?:seen|shown|depicted|visible) in the (?:image|picture|photo)\b",
    )
    forbidden_in_reflection: tuple[str, ...] = (
        r"\b(?:second|2nd|reference|target|ground[- ]truth) (?:image|picture|photo|version)\b",
        r"\bthe (?:other|better|ideal) (?:image|picture|photo|version)\b",
        r"\b(?:image|picture|photo) (?:1|2|two|b)\b",
        r"\bthe (?:reference|ground truth)\b",
        r"\b(?:both|between the) (?:images|pictures|photos)\b",
    )

    def __post_init__(self):
        for low, high in (("min_thought_chars", "max_thought_chars"),
                          ("min_reflection_chars", "max_reflection_chars"),
                          ("min_similarity", "max_similarity")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} is {getattr(self, low)}, above {high} {getattr(self, high)}; nothing "
                                 "would be taken")
        for name in ("max_prompt_chars", "max_thought_chars", "max_reflection_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        limits = dict.fromkeys(("max_prompt_chars", "max_thought_chars", "max_reflection_chars"), MAX_CHARS)
        for name, limit in (limits | {"min_quality": 10, "near_bits": 63}).items():
            if getattr(self, name) > limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it can be {limit} at most")
        for pattern in (*self.forbidden_in_thought, *self.forbidden_in_reflection):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the forbidden pattern {pattern!r} is no regular expression ({error})"
                                 ) from error


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the estimate takes for granted; measure yours on a hundred prompts."""

    chars_per_token: float = 4.0
    image_tokens: int = 1300       # of an image that is shown to the critic
    thought_tokens: int = 230
    reflection_tokens: int = 400
    score_tokens: int = 5

    def __post_init__(self):
        if self.chars_per_token <= 0:
            raise ValueError(f"chars_per_token is {self.chars_per_token}; it must be positive")


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """A data set to be made from prompts."""

    prompts: str                     # .jsonl or .txt, see `cases`
    critic: CriticConfig
    sketcher: SketcherConfig = SketcherConfig()
    painter: PainterConfig = PainterConfig()
    modes: tuple[str, ...] = MODES
    improve_pairs: bool = False      # a pair's own image is the better image of a first round, too
    licence: str = ""                # of prompts and images whose line names none
    templates: str = ""              # folder; empty: ours
    filters: FilterConfig = FilterConfig()
    safety: str = ""                 # "package.module:function" of (prompt, texts, images) -> "" or a cause
    estimate: Assumptions = Assumptions()
    seed: int = 0                    # of the shapes critic
    split: str = ""                  # folder above the modes
    suffix: str = "_learning"        # of the modes' folders, as released
    rows_per_file: int = 1000
    rows_per_group: int = 16         # small row groups keep random access cheap

    def __post_init__(self):
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"modes name the unknown {mode!r}; use {', '.join(MODES)}")
        if not self.modes or len({*self.modes}) != len(self.modes):
            raise ValueError(f"modes are {self.modes}; name at least one, and each once")
        for name in ("rows_per_file", "rows_per_group"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("split", "suffix"):
            if not re.fullmatch(r"[\w.-]*", getattr(self, name)) or getattr(self, name).startswith("."):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is part of a folder's name")
        if (self.painter.kind == "shapes") != (self.critic.kind == "shapes"):
            raise ValueError(f"painter.kind is {self.painter.kind!r} and critic.kind {self.critic.kind!r}; the "
                             "shapes renderer paints what the shapes detector wants: set both to 'shapes', or "
                             "none")
        if self.critic.kind == "shapes" and self.improve_pairs:
            raise ValueError("improve_pairs is True; the shapes detector says what its own renderer should "
                             "paint, not how a pair's image came about: set it to False")
