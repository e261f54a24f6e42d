"""Better images: what a prompt should have been drawn as."""

import pathlib
from typing import NamedTuple, Protocol

from data_pipelines.curation.cases import read_picture
from data_pipelines.curation.material import Case, Picture, Rejected, Round
from data_pipelines.curation.templates import Templates
from data_pipelines.endpoints import Endpoint
from data_pipelines.lines import Folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Painted(NamedTuple):
    """An image, and who made it, as JSON."""

    image: Picture
    source: dict[str, str]


class Painter(Protocol):
    """Safe to use from many threads."""

    def paint(self, case: Case, first: Round | None) -> Painted:
        """Args: first is what shall become better, if there is any. Raises: Rejected if nothing can be made."""


class FolderPainter:
    """A folder of <id>.png, .jpg, .jpeg or .webp. The images are kept byte by byte."""

    def __init__(self, folder: str | pathlib.Path):
        """Raises: ValueError if there is no such folder."""
        self._root = pathlib.Path(folder)
        if not self._root.is_dir():
            raise ValueError(f"painter: {str(folder)!r} is no folder; it holds <id>.png of every case")
        self._folder = Folder(self._root)

    def paint(self, case: Case, first: Round | None) -> Painted:
        """Raises: Rejected if there is no image of this id, or it does not decode."""
        for suffix in SUFFIXES:
            name = f"{case.id}{suffix}"
            if (self._root / name).is_file():
                return Painted(read_picture(self._folder, name, where=name), {"by": "folder", "file": name})
        raise Rejected("no_image", f"{self._root} holds no image {case.id}{SUFFIXES[0]}")


class EndpointPainter:
    """An image model behind an endpoint."""

    def __init__(self, endpoint: Endpoint, templates: Templates, *, size: str):
        self._endpoint, self._templates, self._size = endpoint, templates, size

    def paint(self, case: Case, first: Round | None) -> Painted:
        """Raises: EndpointError, BudgetSpent."""
        text = self._templates.paint.substitute(prompt=case.prompt)
        file = self._endpoint.draw(text, size=self._size).file
        return Painted(Picture.read(file, file.read_bytes()),
                       {"by": "endpoint", "model": self._endpoint.config.model})
