"""Composed pictures: every image is in them unharmed, all text fits, and bad input is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from irg_jax.evaluation.drawing import (
    MARGIN,
    Section,
    compose_trajectory,
    image_grid,
    split_sections,
    wrap_text,
)
from irg_jax.evaluation.samples import draw_grid
from irg_jax.sampling.trajectory import Turn

THINK2 = """<think>The circle is blue.
It should be red.
### Required improvements
1. Repaint it.
### Step-by-step modification:
First the circle.
#### **Final comprehensive prompt**
A red circle.</think>"""


def flat(colour: tuple[int, int, int], height: int = 16, width: int = 24) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


def count_pixels(picture, colour) -> int:
    return int((np.asarray(picture) == np.array(colour)).all(-1).sum())


def test_sections_are_the_four_parts():
    assert split_sections(THINK2) == (
        Section("", "The circle is blue.\nIt should be red."),
        Section("Required improvements", "1. Repaint it."),
        Section("Step-by-step modification", "First the circle."),
        Section("Final comprehensive prompt", "A red circle."))


@pytest.mark.parametrize("text, count", [("", 0), ("<think></think>", 0), ("plain", 1),
                                         ("### a", 1)])
def test_sections_of_short_texts(text, count):
    assert len(split_sections(text)) == count


def test_trajectory_shows_every_image_enlarged():
    picture = compose_trajectory("two red circles", [("plan", flat((200, 10, 10))),
                                                     (THINK2, flat((10, 10, 200)))], scale=3)
    assert count_pixels(picture, (200, 10, 10)) == 16 * 24 * 9
    assert count_pixels(picture, (10, 10, 200)) == 16 * 24 * 9
    pixels = np.asarray(picture)
    red = np.argwhere((pixels == (200, 10, 10)).all(-1))
    blue = np.argwhere((pixels == (10, 10, 200)).all(-1))
    assert red[:, 0].max() < blue[:, 0].min(), "turn 1 stands above turn 2"


@pytest.mark.parametrize("text", ["", "word " * 900, "x" * 3000, "line\n" * 80])
def test_nothing_is_written_into_the_margin(text):
    picture = compose_trajectory(text, [(text, flat((9, 9, 9))), (text, flat((9, 9, 9)))], scale=2)
    pixels = np.asarray(picture)
    frame = np.ones(pixels.shape[:2], bool)
    # Glyphs may lean a pixel or two over their own box; a margin is twenty times that.
    frame[MARGIN - 4 : 4 - MARGIN, MARGIN - 4 : 4 - MARGIN] = False
    assert (pixels[frame] == pixels[0, 0]).all()


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.just("\n"),
               max_size=300), st.integers(60, 400))
def test_wrapping_fits_and_keeps_every_character(text, width):
    lines = wrap_text(text, 17, width)
    font = ImageFont.load_default(size=17)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_grid_places_images_row_by_row():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    grid = np.asarray(image_grid([flat(colour) for colour in colours], ["a", "b", "c"], 2, scale=2))
    corners = [np.argwhere((grid == colour).all(-1)) for colour in colours]
    assert [len(corner) for corner in corners] == 3 * [16 * 24 * 4]
    first, second, third = (corner.min(0) for corner in corners)
    assert first[0] == second[0] < third[0] and first[1] == third[1] < second[1]


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8),
                                   np.zeros((4, 4, 4), np.uint8)])
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        compose_trajectory("prompt", [("", image)], scale=2)


def test_empty_or_uneven_input_is_refused():
    with pytest.raises(ValueError, match="one turn"):
        compose_trajectory("prompt", [], scale=2)
    with pytest.raises(ValueError, match="2 labels"):
        image_grid([flat((1, 2, 3))], ["a", "b"], 1)


def test_trajectories_that_ended_early_keep_their_row():
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
    first, second, third, nothing = (flat(colour) for colour in colours)
    grid = draw_grid(("a", "b"), [(Turn("", first),), (Turn("", second), Turn("", third))])
    scale = 128 // first.shape[0]
    expected = image_grid([first, nothing, second, third], ["a", "", "b", "turn 2"], 2, scale=scale)
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(expected))
