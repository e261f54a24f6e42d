"""Questions about rendered scenes: how well a model understands what it sees, kind by kind.

The scenes are of the training side of the split, but none that any data set holds: their seeds have a name
of their own. An answer is right if it is the true one word for word; of a list the order does not matter.
"""

import collections
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from data_pipelines.shapes import language
from data_pipelines.shapes.records import generator
from data_pipelines.shapes.render import render
from data_pipelines.shapes.sample import sample_request, sample_scene

KINDS = {  # in this order; the first that matches the beginning of a question names it
    "what": ("what is in the picture", "what does the image show"),
    "what is where": (language.WHAT_IS_WHERE,),
    "what is there": ("what is at the",),
    "background": ("what is the colour of the background",),
    "which colour": ("what is the colour",),
    "how many": ("how many",),
    "where": ("where",),
    "is there": ("is there",),
}

LAYOUT_SHARE = 0.15   # of the questions ask for everything and its place


class Question(NamedTuple):
    """A picture uint8 [side, side, 3], what is asked about it, and the true answer."""

    image: np.ndarray
    text: str
    answer: str

    @property
    def kind(self) -> str:
        return next(kind for kind, starts in KINDS.items() if self.text.startswith(starts))


def make_question(index: int, *, seed: int, side: int) -> Question:
    rng = generator(seed, "examination", index)
    scene = sample_scene(rng, sample_request(rng, split="train"), split="train")
    image = render(scene, side=side)
    if rng.random() < LAYOUT_SHARE:
        return Question(image, language.WHAT_IS_WHERE, language.caption(None, scene))
    return Question(image, *language.question(rng, scene))


def is_right(question: Question, given: str) -> bool:
    """Whether an answer says what is true."""
    if question.kind == "what is where":
        return _parts(given) == _parts(question.answer)
    if question.kind != "what":
        return given.strip() == question.answer
    return _listed(given) == _listed(question.answer)


def _parts(text: str) -> list[str]:
    return sorted(text.strip().removesuffix(".").split("; "))


def _listed(text: str) -> tuple[str, ...]:
    """The things of a list: "a red ring and two stars on white." -> ("a red ring", "two stars")."""
    text = re.sub(r" on [a-z ]+$", "", text.strip().removesuffix("."))
    return tuple(sorted(re.split(r", | and ", text)))


def grade(questions: Sequence[Question], given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each kind of question, and overall: the number asked, the share right, its 95 % interval."""
    marks = collections.defaultdict(list)
    for question, answer in zip(questions, given, strict=True):
        for kind in (question.kind, "overall"):
            marks[kind].append(is_right(question, answer))
    return {kind: {"asked": len(marks[kind]), "right": float(np.mean(marks[kind])),
                   "ci95": [float(end) for end in binomtest(
                       sum(marks[kind]), len(marks[kind])).proportion_ci(method="wilson")]}
            for kind in ("overall", *KINDS) if marks[kind]}
