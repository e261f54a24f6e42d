"""Composes pictures: a trajectory as one image, and grids of images.

Pixels are uint8 [H, W, 3] arrays; what comes back is a PIL image. Text is set in Pillow's
own font, so that a picture looks the same on every machine.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED, RULE = "#fbfaf7", "#23211e", "#7a746a", "#e2ddd3"
MARGIN, GUTTER, TEXT_WIDTH = 40, 28, 560
BODY, SMALL, TITLE = 17, 14, 25  # font sizes; a line is one and a half times as high


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a think text; the part before the first heading has no title."""

    title: str
    body: str


def split_sections(text: str) -> tuple[Section, ...]:
    """The parts of a think text, told apart by its `###` headings; empty parts are left out.

        <think>The circle is blue.
        ### Required improvements       ->  ("", "The circle is blue."),
        Make it red.</think>                ("Required improvements", "Make it red.")
    """
    sections, title, lines = [], "", []
    plain = re.sub(r"</?think>|<\|im_(?:start|end)\|>", "", text)
    for line in [*plain.splitlines(), "###"]:
        if line.lstrip().startswith("###"):
            body = "\n".join(lines).strip()
            sections += [Section(title, body)] if title or body else []
            title, lines = line.strip(" \t#:*"), []
        else:
            lines.append(line)
    return tuple(sections)


def compose_trajectory(prompt: str, turns: Sequence[tuple[str, np.ndarray]], *,
                       scale: int = 4) -> Image.Image:
    """One picture of a trajectory: the prompt on top, below it every turn's image and think text.

    Args:
      prompt: what was asked for.
      turns: (think text, image uint8 [H, W, 3]) of each turn, in order; the text may be empty.
      scale: how many times larger an image is shown.

    Raises ValueError if there is no turn, an image is not uint8 [H, W, 3] or scale is below 1.
    """
    if not turns or scale < 1:
        raise ValueError(f"needs at least one turn and a scale of 1 or more, "
                         f"got {len(turns)} turns and scale {scale}")
    images = [_enlarge(image, scale) for _, image in turns]
    left = MARGIN + max(image.width for image in images) + GUTTER
    width = left + TEXT_WIDTH + MARGIN
    title = [(line, TITLE, INK) for line in wrap_text(prompt, TITLE, width - 2 * MARGIN)]
    texts = [_set_turn(number, text) for number, (text, _) in enumerate(turns, 1)]
    heights = [max(image.height, _height(lines))
               for image, lines in zip(images, texts, strict=True)]

    top = MARGIN + _height(title) + GUTTER
    canvas = Image.new("RGB", (width, top + sum(heights) + 2 * GUTTER * (len(turns) - 1) + MARGIN),
                       PAPER)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MARGIN, MARGIN), title)
    for number, (image, lines, height) in enumerate(zip(images, texts, heights, strict=True)):
        if number:
            draw.line((MARGIN, top - GUTTER, width - MARGIN, top - GUTTER), fill=RULE)
        canvas.paste(image, (MARGIN, top))
        _write(draw, (left, top), lines)
        top += height + 2 * GUTTER
    return canvas


def image_grid(images: Sequence[np.ndarray], labels: Sequence[str], columns: int, *,
               scale: int = 2) -> Image.Image:
    """Images uint8 [H, W, 3] row by row, each above its label; ValueError if the counts differ."""
    if not images or len(images) != len(labels) or columns < 1 or scale < 1:
        raise ValueError(f"needs images, one label each, columns and scale of 1 or more; got "
                         f"{len(images)} images, {len(labels)} labels, {columns} and {scale}")
    cells = [_enlarge(image, scale) for image in images]
    width = max(max(cell.width for cell in cells), 120)
    texts = [[(line, SMALL, MUTED) for line in wrap_text(label, SMALL, width)] for label in labels]
    rows = [range(start, min(start + columns, len(cells)))
            for start in range(0, len(cells), columns)]
    pictures = [max(cells[index].height for index in row) for row in rows]
    heights = [picture + 8 + max(_height(texts[index]) for index in row)
               for picture, row in zip(pictures, rows, strict=True)]
    shown = min(columns, len(cells))
    canvas = Image.new("RGB", (2 * MARGIN + shown * (width + GUTTER) - GUTTER,
                               2 * MARGIN + sum(heights) + GUTTER * (len(rows) - 1)), PAPER)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for row, picture, height in zip(rows, pictures, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (width + GUTTER)
            canvas.paste(cells[index], (left, top))
            _write(draw, (left, top + picture + 8), texts[index])
        top += height + GUTTER
    return canvas


def wrap_text(text: str, size: int, width: int) -> list[str]:
    """Lines of at most `width` pixels; breaks at spaces, and inside a word only if it must."""
    font, lines = _font(size), []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if font.getlength(joined) <= width:
                line = joined
                continue
            lines += [line] if line else []
            line = word
            while font.getlength(line) > width:
                # No glyph is narrower than a pixel, so a line never has more than `width` of them.
                lengths = range(1, min(len(line), width + 1))
                fits = bisect.bisect_right(lengths, width, key=lambda n: font.getlength(line[:n]))
                lines.append(line[: max(fits, 1)])
                line = line[max(fits, 1) :]
        lines.append(line)
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _set_turn(number: int, text: str) -> list[tuple[str, int, str]]:
    """The lines of one turn as (line, font size, colour)."""
    lines = [(f"Turn {number}", SMALL, MUTED), ("", 6, INK)]
    for section in split_sections(text):
        if section.title:
            lines += [("", 8, INK), (section.title, SMALL, MUTED)]
        lines += [(line, BODY, INK) for line in wrap_text(section.body, BODY, TEXT_WIDTH)]
    return lines


def _height(lines: Sequence[tuple[str, int, str]]) -> int:
    return sum(size * 3 // 2 for _, size, _ in lines)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int],
           lines: Sequence[tuple[str, int, str]]) -> None:
    left, top = corner
    for line, size, colour in lines:
        draw.text((left, top), line, font=_font(size), fill=colour)
        top += size * 3 // 2


def _enlarge(image: np.ndarray, scale: int) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    return picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
