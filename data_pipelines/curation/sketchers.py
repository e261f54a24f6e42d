"""First rounds: what the base model thinks of a prompt and draws, before it looks at it."""

import json
import pathlib
import re
from typing import Any, Protocol

from data_pipelines.curation.cases import read_picture
from data_pipelines.curation.material import Case, Picture, Rejected, Round
from data_pipelines.endpoints import Endpoint, said
from data_pipelines.lines import Folder

REQUEST = "prompt.json"
MAX_TEXT_BYTES = 2**20


class Sketcher(Protocol):
    """Safe to use from many threads."""

    def has(self, case: Case) -> bool:
        """Whether there is any hope of a first round; asks nobody."""

    def sketch(self, case: Case) -> Round:
        """Raises: Rejected if there is none."""


class FolderSketcher:
    """A folder that `irg_jax.generate` wrote: 0000/prompt.json, turn1.txt, turn1.png. Matched by prompt.

    Of several drawings of one prompt the first counts.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Raises: ValueError if the folder holds no drawing, or one that cannot be told from others."""
        self._root = pathlib.Path(folder)
        if not self._root.is_dir():
            raise ValueError(f"first rounds: {str(folder)!r} is no folder; give --out of irg_jax.generate")
        self._folder = Folder(self._root)
        self._drawings: dict[str, tuple[str, dict[str, Any]]] = {}
        names = sorted((path.name for path in self._root.iterdir() if re.fullmatch(r"\d{4,9}", path.name)),
                       key=int)
        for name in names:
            request = self._read_request(name)
            source = {key: request[key] for key in ("seed", "checkpoint") if key in request}
            self._drawings.setdefault(request["prompt"].strip(), (name, source))
        if not names:
            raise ValueError(f"first rounds: {str(folder)!r} holds no 0000/{REQUEST}; give --out of "
                             "irg_jax.generate")

    def has(self, case: Case) -> bool:
        """Whether the folder has the prompt."""
        return case.prompt in self._drawings

    def sketch(self, case: Case) -> Round:
        """Raises: Rejected if there is none, or it is not whole."""
        if case.prompt not in self._drawings:
            raise Rejected("no_first_round", f"no prompt.json in {self._root} has this prompt")
        name, source = self._drawings[case.prompt]
        try:
            thought = self._folder.read(f"{name}/turn1.txt", where=f"{name}/turn1.txt", limit=MAX_TEXT_BYTES
                                        ).decode("utf-8").strip()
        except (ValueError, UnicodeDecodeError) as error:
            raise Rejected("broken_first_round", str(error)) from error
        if not thought:
            raise Rejected("empty_first_thought", f"{name}/turn1.txt")
        try:
            picture = read_picture(self._folder, f"{name}/turn1.png", where=f"{name}/turn1.png")
        except Rejected as rejected:
            raise Rejected("broken_first_round", rejected.told) from rejected
        return Round(thought, picture, {"by": "irg_jax.generate", "folder": name, **source})

    def _read_request(self, name: str) -> dict[str, Any]:
        place = f"{self._root / name / REQUEST}"
        try:
            request = json.loads(self._folder.read(f"{name}/{REQUEST}", where=place, limit=MAX_TEXT_BYTES))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: the request cannot be read ({error}); remove the folder, or draw it "
                             "again") from error
        if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
            raise ValueError(f"{place}: names no prompt; remove the folder, or draw it again")
        return request


class EndpointSketcher:
    """A base model behind endpoints: its thought after the system prompt, its image from the prompt.

    Without a writer the thought is the `revised_prompt` that comes with the image, as from `irg_jax.serve`.
    """

    def __init__(self, writer: Endpoint | None, painter: Endpoint, *, size: str, system_prompt: str):
        self._writer, self._painter, self._size = writer, painter, size
        self._system_prompt = system_prompt

    def has(self, case: Case) -> bool:
        """Always."""
        return True

    def messages(self, case: Case) -> list[dict[str, Any]]:
        """What a writer is asked."""
        opening = [said(self._system_prompt, role="system")] if self._system_prompt else []
        return [*opening, said(case.prompt)]

    def sketch(self, case: Case) -> Round:
        """Raises: Rejected if it thinks nothing; EndpointError, BudgetSpent."""
        source = {"by": "endpoint", "painter": self._painter.config.model}
        thought = None
        if self._writer:
            thought = self._writer.ask(self.messages(case), parse=_need_text).value
            source["writer"] = self._writer.config.model
            if thought is None:
                raise Rejected("empty_first_thought", "the writer says nothing, or was cut off by max_tokens")
        drawn = self._painter.draw(case.prompt, size=self._size)
        thought = thought or drawn.told.strip()
        if not thought:
            raise Rejected("empty_first_thought", "no revised_prompt came with the image")
        return Round(thought, Picture.read(drawn.file, drawn.file.read_bytes()), source)


def _need_text(answer: str) -> str:
    if not answer.strip():
        raise ValueError("no thought")
    return answer.strip()
