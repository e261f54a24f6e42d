"""Scenes and requests: JSON, the held-out split, sampling, flaws, and their judge."""

import collections
import dataclasses
import hashlib
import json

import numpy as np
import pytest

from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.render import render
from data_pipelines.shapes.sample import SPLITS, sample_request, sample_scene
from data_pipelines.shapes.scene import CATEGORIES, Group, Request, Scene, Thing
from data_pipelines.shapes.split import KIND_OF_CATEGORY, all_keys, combinations, held_out_keys

CIRCLE = Thing("circle", "red", "plain", 0.25, 0.25, 0.3)
SQUARE = Thing("square", "blue", "striped", 0.7, 0.75, 0.4)
SCENE = Scene("position", (CIRCLE, SQUARE), "white")


def draw(split: str, category: str, num: int, seed: int = 0):
    rng = np.random.default_rng((seed, SPLITS.index(split), CATEGORIES.index(category)))
    for _ in range(num):
        request = sample_request(rng, split=split, category=category)
        yield rng, request, sample_scene(rng, request, split=split)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", SPLITS)
def test_request_survives_json(split, category):
    for _, request, _ in draw(split, category, 100):
        assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize("change, message", [
    ({"category": "shapes"}, "request.category is 'shapes'"),
    ({"groups": []}, r"request.groups is \[\]: give a list"),
    ({"groups": [{"shape": "blob"}]}, r"request.groups\[0\].shape is 'blob'"),
    ({"groups": [{"shape": "star", "count": True}]}, r"groups\[0\].count is True"),
    ({"groups": [{"shape": "star", "colour": ["red"]}]}, r"groups\[0\].colour is \['red'\]"),
    ({"groups": [{"shape": "star", "color": "red"}]}, r"has unknown fields \['color'\]"),
    ({"relation": "behind"}, "request.relation is 'behind'"),
    ({"groups": [{"shape": "star"}], "relation": "above"}, "needs two"),
    ({"background": "loud"}, "request.background is 'loud'"),
])
def test_wrong_json_names_the_field(change, message):
    good = {"category": "position", "groups": [{"shape": "star"}, {"shape": "ring"}]}
    Request.from_json(good)
    with pytest.raises(ValueError, match=message):
        Request.from_json(good | change)


def test_combinations_of_a_scene_by_hand():
    assert combinations(SCENE) == {
        ("shape on background", "circle", "white"), ("shape on background", "square", "white"),
        ("colour of shape", "red", "circle"), ("colour of shape", "blue", "square"),
        ("shape and shape", "circle", "square"), ("coloured pair", "red circle", "blue square"),
        ("shape by shape", "circle", "left of", "square"),
        ("shape by shape", "circle", "above", "square"),
    }
    three = dataclasses.replace(SCENE, things=tuple(
        dataclasses.replace(CIRCLE, x=x, y=x, colour=colour)
        for x, colour in ((0.2, "red"), (0.5, "red"), (0.8, "blue"))))
    assert combinations(three) == {
        ("shape on background", "circle", "white"), ("count of shape", "3", "circle"),
        ("colour of shape", "red", "circle"), ("colour of shape", "blue", "circle")}


@pytest.mark.parametrize("relation, key", [
    ("left of", ("star", "left of", "ring")), ("right of", ("ring", "left of", "star")),
    ("above", ("star", "above", "ring")), ("below", ("ring", "above", "star"))])
def test_a_relation_and_its_converse_are_one_key(relation, key):
    request = Request("position", (Group("star"), Group("ring")), relation)
    assert ("shape by shape", *key) in combinations(request)


def test_what_a_request_asks_is_in_every_scene_of_it():
    for category in CATEGORIES:
        for _, request, scene in draw("heldout", category, 100):
            assert combinations(request) <= combinations(scene)


def test_held_out_share_of_each_kind():
    total = collections.Counter(key[0] for key in all_keys())
    held_out = collections.Counter(key[0] for key in held_out_keys())
    assert set(total) == set(KIND_OF_CATEGORY.values())
    for kind in total:
        assert 0.12 <= held_out[kind] / total[kind] <= 0.19, kind


def test_the_split_never_moves():
    # A base checkpoint trained on one split must not be tested on another.
    text = "\n".join(sorted(" ".join(key) for key in held_out_keys()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "41b35913f3809448"


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_scenes_and_flaws_hold_nothing_held_out(category):
    forbidden = held_out_keys()
    for rng, request, scene in draw("train", category, 500):
        flawed, _ = make_flawed(rng, request, scene, split="train")
        assert not (combinations(request) | combinations(scene) | combinations(flawed)) & forbidden


@pytest.mark.parametrize("category", CATEGORIES)
def test_heldout_requests_are_new_in_their_own_kind_only(category):
    distinct = set()
    for _, request, _ in draw("heldout", category, 500):
        kinds = {key[0] for key in combinations(request) & held_out_keys()}
        assert kinds == {KIND_OF_CATEGORY[category]}
        distinct.add(json.dumps(request.to_json()))
    assert len(distinct) >= 60


def test_training_covers_every_key_that_is_not_held_out():
    seen = set()
    for category in CATEGORIES:
        for _, _, scene in draw("train", category, 700):
            seen |= combinations(scene)
    apart = {frozenset(key[1:]) for key in held_out_keys() if key[0] == "shape and shape"}
    wanted = {key for key in set(all_keys()) - held_out_keys() if key[0] != "coloured pair"
              and not (key[0] == "shape by shape" and {key[1], key[3]} in apart)}
    assert wanted <= seen


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_fulfil_their_request_and_show_nothing_else(split, category):
    for _, request, scene in draw(split, category, 200):
        assert judge(request, scene.things, scene.background) == ()
        assert len(scene.things) == sum(group.count for group in request.groups)
        for i, one in enumerate(scene.things):
            assert all(one.size / 2 < value < 1 - one.size / 2 for value in (one.x, one.y))
            for other in scene.things[:i]:
                gap = max(abs(one.x - other.x), abs(one.y - other.y))
                assert gap > (one.size + other.size) / 2 + 2 / 64


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_a_flaw_breaks_the_request_and_touches_only_what_it_names(split, category):
    kinds = set()
    for rng, request, scene in draw(split, category, 200):
        flawed, flaw = make_flawed(rng, request, scene, split=split)
        kinds.add(flaw.kind)
        assert judge(request, flawed.things, flawed.background)
        before, after = set(scene.things), set(flawed.things)
        assert before - after == set(flaw.wanted) and after - before == set(flaw.seen)
        assert (scene.background != flawed.background) == (flaw.kind == "background")
    own = {"counting": "extra", "colors": "colour", "position": "place", "color_attr": "colour"}
    assert own.get(category, "shape") in kinds


@pytest.mark.parametrize("request_, reason", [
    (Request("single_object", (Group("circle"),)), None),
    (Request("single_object", (Group("star"),)), "expected 1 star, saw none"),
    (Request("counting", (Group("circle", 3),)), "expected 3 circles, saw 1"),
    (Request("counting", (Group("cross", 2),)), "expected 2 crosses, saw none"),
    (Request("colors", (Group("circle", colour="blue"),)),
     "expected 1 blue circle, saw only red ones"),
    (Request("two_object", (Group("circle", size="large"), Group("square"))),
     "expected 1 large circle, saw another size or texture"),
    (Request("two_object", (Group("square", texture="striped", size="large"),)), None),
    (Request("position", (Group("circle"), Group("square")), "left of"), None),
    (Request("position", (Group("circle"), Group("square")), "above"), None),
    (Request("position", (Group("circle"), Group("square")), "right of"),
     "expected 1 circle right of 1 square, saw them elsewhere"),
    (Request("single_object", (Group("circle"),), None, "pale blue"),
     "expected a pale blue background, saw white"),
])
def test_the_judge_by_hand(request_, reason):
    assert judge(request_, SCENE.things, SCENE.background) == ((reason,) if reason else ())


def test_extra_things_count_only_where_numbers_are_asked():
    three = (CIRCLE, dataclasses.replace(CIRCLE, y=0.75), SQUARE)
    assert not judge(Request("single_object", (Group("circle"),)), three, "white")
    assert judge(Request("counting", (Group("circle", 3),)), three, "white")
    mixed = Request("position", (Group("circle", 2, "red"), Group("square", 1, "blue")), "left of")
    assert not judge(mixed, three, "white")
    beyond = (CIRCLE, dataclasses.replace(CIRCLE, x=0.9, y=0.25), SQUARE)
    assert judge(mixed, beyond, "white")


def test_sampling_is_a_function_of_its_generator():
    once, again = ([(request, scene) for _, request, scene in draw("train", "position", 20)]
                   for _ in range(2))
    assert once == again
    assert np.array_equal(render(once[0][1]), render(again[0][1]))


@pytest.mark.parametrize("side", [64, 80, 96])
def test_render_puts_colours_where_the_scene_says(side):
    image = render(SCENE, side=side)
    assert image.shape == (side, side, 3) and image.dtype == np.uint8
    assert image[side // 4, side // 4].tolist() == [226, 48, 54]
    assert image[0, 0].tolist() == image[side - 1, 0].tolist() == [255, 255, 255]
    inside = image[int(0.62 * side):int(0.88 * side), int(0.57 * side):int(0.83 * side)]
    assert {tuple(pixel) for pixel in inside.reshape(-1, 3)} >= {(48, 104, 224), (20, 56, 148)}
    # Anti-aliased: the circle's edge has values between its colour and the background.
    green = np.unique(image[:side // 2, :side // 2, 1])
    assert len(green) > 10


@pytest.mark.parametrize("side", [32, 70, 128])
def test_render_refuses_other_sides(side):
    with pytest.raises(ValueError, match=f"side is {side}"):
        render(SCENE, side=side)


def test_unknown_split_and_category_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="split is 'test'"):
        sample_request(rng, split="test")
    with pytest.raises(ValueError, match="category is 'colours'"):
        sample_request(rng, split="train", category="colours")
