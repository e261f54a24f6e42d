"""What is not taken: small functions that name a cause, or return "".

Every cause is counted in the manifest, and every rejection is a line of `rejected.jsonl`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.curation.config import FilterConfig
from data_pipelines.curation.looks import Look, measure_similarity
from data_pipelines.curation.templates import MARK, split_parts

Safety = Callable[[str, Sequence[str], Sequence[np.ndarray]], str]


class Rules(NamedTuple):
    """What is asked of every case; `headings` are those of a reflection, in order."""

    config: FilterConfig
    headings: tuple[str, ...]
    safety: Safety | None = None

    def judge_thought(self, thought: str) -> str:
        """Of a thought in think tags."""
        config = self.config
        bare = _bare(thought, ())
        return (check_unicode(thought) or check_length(
            bare, "thought", config.min_thought_chars, config.max_thought_chars)
            or check_mentions(bare, "thought", config.forbidden_in_thought))

    def judge_reflection(self, reflection: str) -> str:
        """Of a reflection in think tags."""
        config = self.config
        bare = _bare(reflection, self.headings)
        return (check_unicode(reflection) or check_template(reflection, self.headings) or check_length(
            bare, "reflection", config.min_reflection_chars, config.max_reflection_chars)
            or check_mentions(bare, "reflection", config.forbidden_in_reflection))

    def judge_safety(self, prompt: str, texts: Sequence[str], images: Sequence[np.ndarray]) -> str:
        """What the hook says."""
        told = self.safety(prompt, texts, images) if self.safety else ""
        if not isinstance(told, str):
            raise ValueError(f"the safety hook returned {told!r}; it returns \"\" or a cause in words")
        return f"safety: {told}" if told else ""


def check_prompt(prompt: str, config: FilterConfig) -> str:
    """Of a prompt as it was read."""
    return check_unicode(prompt) or check_length(prompt, "prompt", 1, config.max_prompt_chars)


def check_unicode(text: str) -> str:
    """JSON may hold half of a surrogate pair, which no tokenizer takes."""
    return "not_unicode" if any("\ud800" <= letter <= "\udfff" for letter in text) else ""


def check_length(text: str, what: str, low: int, high: int) -> str:
    """In characters, both ends included; white space around the text does not count."""
    count = len(text.strip())
    return f"{what}_too_short" if count < low else f"{what}_too_long" if count > high else ""


def check_mentions(text: str, what: str, patterns: Sequence[str]) -> str:
    """A text that speaks of an image that its reader will not see."""
    spaced = " ".join(text.split())
    return f"{what}_mentions_image" if any(re.search(one, spaced, re.IGNORECASE) for one in patterns) else ""


def check_template(reflection: str, headings: Sequence[str]) -> str:
    """All parts in one pair of think tags, each heading once and in order; others are the parts' own."""
    if not (reflection.startswith("<think>") and reflection.endswith("</think>")):
        return "template"
    inside = reflection[len("<think>"):-len("</think>")]
    wanted = [f"{MARK} {heading}" for heading in headings]
    try:
        split_parts(inside, tuple(headings))
    except ValueError:
        return "template"
    is_whole = [line for line in inside.splitlines() if line in wanted] == wanted and "think>" not in inside
    return "" if is_whole else "template"


def check_side(look: Look, config: FilterConfig) -> str:
    """Of the shorter side."""
    return "small_image" if min(look.height, look.width) < config.min_side else ""


def check_similarity(first: Look, better: Look, config: FilterConfig) -> str:
    """Of images of any sizes."""
    if config.min_similarity <= -1 and config.max_similarity >= 1:
        return ""
    found = measure_similarity(first, better)
    return "too_different" if found < config.min_similarity else (
        "too_similar" if found > config.max_similarity else "")


def check_quality(score: float, config: FilterConfig) -> str:
    """Args: score from 0 to 10."""
    return "low_quality" if score < config.min_quality else ""


class Seen:
    """What was taken before; to be asked in the order of the cases, by one thread."""

    def __init__(self, near_bits: int):
        """Args: near_bits as of `FilterConfig`."""
        self._near_bits = near_bits
        self._prompts: set[str] = set()
        self._digests: set[str] = set()
        self._prints, self._count = np.zeros(1024, np.uint64), 0

    def check_prompt(self, prompt: str) -> str:
        """Of prompts that differ in capitals, spaces and punctuation at the ends, the first is new."""
        return "duplicate_prompt" if _fold(prompt) in self._prompts else ""

    def check_image(self, sha256: str, bits: int) -> str:
        """Args: the digest of an image's bytes, and its fingerprint."""
        if self._near_bits < 0:
            return ""
        if sha256 in self._digests:
            return "duplicate_image"
        differing = np.bitwise_count(self._prints[:self._count] ^ np.uint64(bits))
        if self._count and differing.min() <= self._near_bits:
            return "near_duplicate_image"
        return ""

    def take_prompt(self, prompt: str) -> None:
        """From here on another one like it is a duplicate."""
        self._prompts.add(_fold(prompt))

    def take_image(self, sha256: str, bits: int) -> None:
        """As `take_prompt`; args as of `check_image`."""
        if self._near_bits < 0:
            return
        self._digests.add(sha256)
        if self._count == len(self._prints):
            self._prints = np.concatenate([self._prints, np.zeros_like(self._prints)])
        self._prints[self._count] = bits
        self._count += 1


def load_safety(name: str) -> Safety | None:
    """The hook that a config names. Raises: ValueError if there is none of that name."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"safety {name!r} cannot be imported ({error}); write package.module:function, "
                         "and run where Python finds it") from error
    if not callable(found):
        raise ValueError(f"safety {name!r} is of type {type(found).__name__}; name a function")
    return found


def _fold(prompt: str) -> str:
    return " ".join(prompt.casefold().split()).strip(" .!?,;:\"'")


def _bare(text: str, headings: Sequence[str]) -> str:
    """Without tags and headings."""
    bare = text.removeprefix("<think>").removesuffix("</think>")
    for heading in headings:
        bare = bare.replace(f"{MARK} {heading}", "")
    return bare
