"""Renders the page: choices of words here, the page itself in `page.html.j2`.

It carries its pictures in itself, runs no script and asks the network for nothing; its own
Content-Security-Policy says so too.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jinja2

from data_pipelines.show_page.modes import ModeView
from data_pipelines.show_page.packs import PackView
from data_pipelines.show_page.records import RecordView, clip

# What a record of a mode teaches; a released name ends in _learning.
MEANINGS = {
    "initial_full": "Read a prompt, think, draw the first picture.",
    "initial_thinking_generation": "Read a prompt and write the plan for the first picture.",
    "initial_thinking_understanding": "Look at a finished picture and write the plan that leads to it.",
    "improving_full": "Look at the first picture, say what is wrong, draw a better one.",
    "improving_thinking_generation": "Look at the first picture and write what is wrong and how to mend it.",
    "improving_thinking_understanding": "Look at a first and a better picture and write what changed and why.",
    "text_to_image": "Read a caption and draw it.",
    "editing": "Look at a picture, read an instruction, draw what it asks for.",
    "vision_language": "Look at pictures, or the frames of a video, and answer questions.",
    "understanding": "Look at a picture and answer a question about it.",
    "description": "Read a prompt, describe the picture in words, draw it.",
}

NOTES = {  # what a record of a kind is, other than its own sample
    "text_to_image": "A record holds several captions; each time one of them is drawn by chance. "
                     "Lengths count all.",
    "editing": "A record holds a row of pictures, each an edit of the one before; each time a chain of one "
               "or two edits is drawn by chance. Lengths count all.",
}


@dataclasses.dataclass(frozen=True)
class Page:
    """All that the page shows; `facts` are how it was made, `packs` are empty without a configuration."""

    title: str
    modes: tuple[ModeView, ...]
    records: Mapping[str, Sequence[RecordView]]
    packs: Sequence[PackView]
    facts: Mapping[str, str]
    num_probed: int   # records of each mode whose sizes were measured; 0 if all


def render_page(page: Page) -> str:
    """The whole page as HTML, in characters that any file can hold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"words": lambda name: clip(name, 200)[0].replace("_", " "), "bytes": format_bytes,
                            "number": lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
                            "percent": lambda value: f"{value:.3f}%"}
    rank = {name: place for place, name in enumerate(MEANINGS)}  # known modes in the order of the work
    modes = sorted(page.modes, key=lambda mode: rank.get(mode.name.removesuffix("_learning"), len(rank)))
    records = {mode.name: page.records[mode.name] for mode in modes}
    page = dataclasses.replace(page, modes=tuple(modes), records=records)
    meanings = {mode.name: MEANINGS.get(mode.name.removesuffix("_learning"), "") for mode in page.modes}
    notes = {mode.name: NOTES.get(mode.kind, "") for mode in page.modes}
    return environment.get_template("page.html.j2").render(page=page, meanings=meanings, notes=notes)


def format_bytes(count: int) -> str:
    """840 bytes, 12 KB, 3.4 MB."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.0f} KB" if count < 1e6 else f"{count / 1e6:.1f} MB"
