"""Crooked pictures: what they show is still there, and they are crooked."""

import numpy as np
import pytest

from data_pipelines.shapes.detect import detect, detect_background
from data_pipelines.shapes.records import generator
from data_pipelines.shapes.render import render
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.sketch import sketch


@pytest.mark.parametrize("side", [64, 96])
def test_a_sketch_shows_what_the_picture_shows_a_little_off(side):
    same, moved = 0, []
    for index in range(60):
        rng = generator(0, "sketch", index)
        scene = sample_scene(rng, sample_request(rng, split="train"), split="train")
        picture = render(scene, side=side)
        drawn = sketch(rng, picture)
        assert drawn.shape == picture.shape and drawn.dtype == np.uint8
        assert detect_background(drawn) == scene.background
        kinds = lambda found: sorted((one.shape, one.colour) for one in found)
        same += kinds(detect(drawn)) == kinds(scene.things)
        moved.append(np.abs(drawn.astype(int) - picture).mean())
    assert same >= 51, "the detector must still read nearly all of them"
    assert min(moved) > 0.2 and len({round(value, 3) for value in moved}) > 50


def test_a_sketch_depends_on_its_random_numbers_alone():
    picture = render(sample_scene(rng := generator(1, "sketch", 0), sample_request(rng, split="train"),
                                  split="train"), side=64)
    one, again, other = (sketch(np.random.default_rng(seed), picture) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
