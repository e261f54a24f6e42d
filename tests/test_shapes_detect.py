"""The detector against rendered truth, wrong pictures, and pictures that are not clean."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.shapes.detect import detect, detect_background, survey
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.render import render
from data_pipelines.shapes.sample import SPLITS, sample_request, sample_scene
from data_pipelines.shapes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    SHAPES,
    TEXTURES,
    Group,
    Request,
    Scene,
    Thing,
)
from data_pipelines.shapes.score import score


def stories(split: str, category: str, num: int):
    rng = np.random.default_rng((11, SPLITS.index(split), CATEGORIES.index(category)))
    for _ in range(num):
        request = sample_request(rng, split=split, category=category)
        scene = sample_scene(rng, request, split=split)
        yield rng, request, scene, make_flawed(rng, request, scene, split=split)[0]


def spoil(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blurred by 0.6 pixels, with grain of 6 grey levels."""
    blurred = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0))
    return np.clip(blurred + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_right_pictures_are_scored_right_and_wrong_ones_wrong(split, category):
    right, wrong = [], []
    for _, request, scene, flawed in stories(split, category, 200):
        right.append(score(request, render(scene)).correct)
        result = score(request, render(flawed))
        assert result.correct == (not result.reasons)
        wrong.append(not result.correct)
    assert np.mean(right) >= 0.99
    assert np.mean(wrong) >= 0.97


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("category", CATEGORIES)
def test_blur_and_grain_do_little_harm(category, side):
    right, wrong = [], []
    for rng, request, scene, flawed in stories("heldout", category, 100 if side == 64 else 50):
        right.append(score(request, spoil(rng, render(scene, side=side))).correct)
        wrong.append(not score(request, spoil(rng, render(flawed, side=side))).correct)
    assert np.mean(right) >= 0.97
    assert np.mean(wrong) >= 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_colour_texture_and_place_is_read(shape):
    for i, colour in enumerate(COLOURS):
        for j, texture in enumerate(TEXTURES):
            for k, size in enumerate((0.25, 0.34, 0.45)):
                x, y = 0.3 + 0.05 * i, 0.35 + 0.1 * j + 0.07 * k
                background = BACKGROUNDS[(i + 3 * j + k) % len(BACKGROUNDS)]
                thing = Thing(shape, colour, texture, x, y, size)
                image = render(Scene("colors", (thing,), background))
                assert detect_background(image) == background
                (seen,) = detect(image)
                assert (seen.shape, seen.colour, seen.texture) == (shape, colour, texture)
                assert np.allclose((seen.x, seen.y, seen.size), (x, y, size), atol=0.015)
                left, top, right, bottom = seen.box
                assert left <= 64 * x <= right and top <= 64 * y <= bottom


def test_empty_and_meaningless_pictures():
    request = Request("single_object", (Group("star"),))
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert detect(blank) == [] and detect_background(blank) == "white"
    assert score(request, blank).reasons == ("expected 1 star, saw none",)
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not score(request, grain).correct
    assert not score(request, np.zeros((64, 64, 3), np.uint8)).correct


@pytest.mark.parametrize("image", [
    np.zeros((64, 64), np.uint8), np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64, 3))])
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="give uint8"):
        detect(image)


def test_a_reason_says_what_was_seen():
    things = tuple(Thing("star", "blue", "plain", x, 0.5, 0.3) for x in (0.25, 0.75))
    image = render(Scene("counting", things, "white"))
    assert score(Request("counting", (Group("star", 3),)), image).reasons == (
        "expected 3 stars, saw 2",)
    assert score(Request("colors", (Group("star", colour="red"),)), image).reasons == (
        "expected 1 red star, saw only blue ones",)


def test_two_things_that_run_into_each_other_are_a_blob():
    things = (Thing("star", "red", "plain", 0.35, 0.5, 0.36), Thing("cross", "red", "plain", 0.62, 0.5, 0.36))
    apart = tuple(dataclasses.replace(thing, x=x) for thing, x in zip(things, (0.25, 0.75)))
    image = lambda things: render(Scene("two_object", things, "white"), side=64)
    seen, num_blobs = survey(image(apart))
    assert num_blobs == 0 and seen == detect(image(apart)) and len(seen) == 2
    assert survey(image(things)) == ([], 1)
