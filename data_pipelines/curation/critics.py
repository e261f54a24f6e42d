"""Who looks at images and writes: the thought before one, the look back at another, a score."""

import pathlib
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from data_pipelines.curation.filters import Rules
from data_pipelines.curation.material import MAX_PIXELS, Case, Picture, Rejected, Round
from data_pipelines.curation.templates import Templates, read_reflection, read_score, read_thought
from data_pipelines.endpoints import Endpoint, said
from data_pipelines.images import image_size
from data_pipelines.lines import Folder

T = TypeVar("T")
TOLD = 300     # letters of an answer that was not taken
MAX_TEXT_BYTES = 2**20


class Critic(Protocol):
    """Safe to use from many threads. Every method raises Rejected if it has nothing fit to say."""

    name: str

    def think(self, case: Case, image: Picture) -> str:
        """The thought in think tags that leads from the prompt to the image."""

    def reflect(self, case: Case, first: Round, better: Picture) -> str:
        """The four parts in think tags that lead from the first image to the better one."""

    def rate(self, case: Case, image: Picture) -> float:
        """How good an image of the prompt is, from 0 to 10."""


class EndpointCritic:
    """A vision-language model behind an endpoint. What the rules refuse is asked for again, like no answer."""

    def __init__(self, endpoint: Endpoint, templates: Templates, rules: Rules, *, max_side: int):
        """Args: max_side of what it is shown, in pixels."""
        self._endpoint, self._templates, self._rules, self._max_side = endpoint, templates, rules, max_side
        self.name = endpoint.config.model

    def think(self, case: Case, image: Picture) -> str:
        """Raises: Rejected, EndpointError, BudgetSpent."""
        text = self._templates.think.substitute(prompt=case.prompt)
        return self._ask("thought", text, [image], read_thought, self._rules.judge_thought)

    def reflect(self, case: Case, first: Round, better: Picture) -> str:
        """Raises: as `think`."""
        text = self._templates.ask_reflection(prompt=case.prompt, first_thought=first.thought)
        read = lambda answer: read_reflection(answer, self._templates.headings)
        return self._ask("reflection", text, [first.image, better], read, self._rules.judge_reflection)

    def rate(self, case: Case, image: Picture) -> float:
        """Raises: as `think`."""
        text = self._templates.quality.substitute(prompt=case.prompt)
        return self._ask("score", text, [image], read_score, lambda score: "")

    def _ask(self, what: str, text: str, images: list[Picture], read: Callable[[str], T],
             judge: Callable[[T], str]) -> T:
        faults = [(f"{what}_unreadable", "every answer was cut off; raise max_tokens in its options")]

        def parse(answer: str) -> T:
            try:
                value = read(answer)
            except ValueError as error:
                faults.append((f"{what}_unreadable", f"{error}: {answer[:TOLD]!r}"))
                raise
            if cause := judge(value):
                faults.append((cause, answer[:TOLD]))
                raise ValueError(cause)
            return value

        shown = [show(image, self._max_side) for image in images]
        reply = self._endpoint.ask([said(text, images=shown)], parse=parse)
        if reply.value is None:
            raise Rejected(*faults[-1])
        return reply.value


class FolderCritic:
    """Texts in files: <id>.thought.txt, <id>.reflection.txt, <id>.quality.txt, written as a critic answers."""

    name = "folder"

    def __init__(self, folder: str | pathlib.Path, headings: tuple[str, ...]):
        """Raises: ValueError if there is no such folder."""
        if not pathlib.Path(folder).is_dir():
            raise ValueError(f"critic: {str(folder)!r} is no folder; it holds <id>.thought.txt of every case")
        self._folder, self._headings = Folder(folder), headings

    def think(self, case: Case, image: Picture) -> str:
        """Raises: Rejected if the file is missing or holds no thought."""
        return self._read(case, "thought", read_thought)

    def reflect(self, case: Case, first: Round, better: Picture) -> str:
        """Raises: as `think`."""
        return self._read(case, "reflection", lambda text: read_reflection(text, self._headings))

    def rate(self, case: Case, image: Picture) -> float:
        """Raises: as `think`."""
        return self._read(case, "score", read_score, name=f"{case.id}.quality.txt")

    def _read(self, case: Case, what: str, read: Callable[[str], T], *, name: str = "") -> T:
        name = name or f"{case.id}.{what}.txt"
        try:
            return read(self._folder.read(name, where=name, limit=MAX_TEXT_BYTES).decode("utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise Rejected(f"{what}_unreadable", str(error)[:TOLD]) from error


def show(image: Picture, max_side: int) -> np.ndarray | bytes:
    """What is sent of an image: a plain PNG of no more than `max_side` as it is, for encoding takes longest."""
    data = image.data
    is_plain = data.startswith(b"\x89PNG") and data[24:26] == b"\x08\x02"    # RGB of 8 bits each
    if is_plain and max(image_size(data, where="", max_pixels=MAX_PIXELS)) <= max_side:
        return data
    return shrink(image.pixels, max_side)


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """uint8 [H, W, 3] with no side longer than `max_side`; never larger than it was."""
    height, width = pixels.shape[:2]
    if max(height, width) <= max_side:
        return pixels
    scale = max_side / max(height, width)
    size = tuple(max(1, round(side * scale)) for side in (width, height))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
