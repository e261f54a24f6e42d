"""The painter: whatever a draft shows, the repaired scene is right, allowed and near; the flaws are true."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shapes import language
from data_pipelines.shapes.flaws import Flaw, make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.repair import repair
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Group, Request, Thing, is_free
from data_pipelines.shapes.split import is_training

RED_CIRCLE = Thing("circle", "red", "plain", 0.25, 0.3, 0.3)
STAR = Thing("star", "yellow", "plain", 0.75, 0.7, 0.3)
PAIR = Request("color_attr", (Group("circle", colour="red"), Group("star", colour="yellow")))


def run(request, things, background="white", seed=0):
    return repair(np.random.default_rng(seed), request, things, background)


def kinds(result):
    return [flaw.kind for flaw in result.flaws]


anything = st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(COLOURS),
                     st.sampled_from(("plain", "striped")), *[st.floats(0.1, 0.9)] * 2, st.floats(0.15, 0.6))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(anything, max_size=7), st.sampled_from(BACKGROUNDS))
def test_any_draft_becomes_a_right_scene(seed, things, background):
    rng = np.random.default_rng(seed)
    request = sample_request(rng, split="train")
    result = repair(rng, request, things, background)
    assert not judge(request, result.right.things, result.right.background)
    assert len(result.right.things) == request.num_things and is_training(result.right)
    is_same = not result.flaws and all(
        (one.shape, one.colour, one.texture) == (other.shape, other.colour, other.texture)
        and abs(one.size - other.size) < 1e-3 for one, other in zip(result.right.things, things))
    assert is_same or all(is_free(thing, result.right.things[:i])
                          for i, thing in enumerate(result.right.things))
    assert (not result.flaws) == (not judge(request, things, background))
    text = language.reflect(rng, request, flaws=result.flaws, flawed=result.draft, right=result.right)
    assert len(text.split()) <= language.MAX_WORDS + 30   # what is seen: a caption
    assert all(text.count(heading) == 1 for heading in language.HEADINGS)


def test_a_draft_with_one_flaw_is_repaired_by_undoing_it():
    same, asked = 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        request = sample_request(rng, split="train")
        right = sample_scene(rng, request, split="train")
        flawed, flaw = make_flawed(rng, request, right, split="train")
        result = repair(rng, request, flawed.things, flawed.background)
        assert result.flaws
        asked += 1
        same += kinds(result) == [flaw.kind]
    assert same / asked > 0.8


def test_what_fits_stays():
    star = dataclasses.replace(STAR, colour="green")
    result = run(PAIR, (star, RED_CIRCLE))
    assert kinds(result) == ["colour"]
    assert result.right.things == (RED_CIRCLE, STAR)
    assert run(PAIR, (STAR, RED_CIRCLE)).flaws == ()


def test_missing_and_too_many():
    result = run(PAIR, (RED_CIRCLE, dataclasses.replace(RED_CIRCLE, shape="cross", colour="green", x=0.7)))
    assert kinds(result) == ["missing", "extra"]
    three = Request("counting", (Group("circle", 3),))
    assert kinds(run(three, (RED_CIRCLE,))) == ["missing"]
    assert len(run(three, (RED_CIRCLE,)).flaws[0].wanted) == 2


def test_swapped_colours_are_two_colour_flaws():
    wrong = (dataclasses.replace(RED_CIRCLE, colour="yellow"), dataclasses.replace(STAR, colour="red"))
    assert kinds(run(PAIR, wrong)) == ["colour", "colour"]


@pytest.mark.parametrize("relation, expected", [("left of", []), ("right of", ["place"]), ("above", [])])
def test_a_relation(relation, expected):
    request = Request("position", (Group("circle"), Group("star")), relation)
    result = run(request, (RED_CIRCLE, STAR if relation == "above" else dataclasses.replace(STAR, y=0.3)))
    assert kinds(result) == expected
    if expected:
        assert (result.right.things[0].x, result.right.things[1].x) == (STAR.x, RED_CIRCLE.x)


def test_a_relation_that_a_swap_cannot_mend_moves_things():
    request = Request("position", (Group("circle"), Group("star")), "above")
    level = dataclasses.replace(STAR, y=0.3)
    assert set(kinds(run(request, (RED_CIRCLE, level)))) == {"moved"}


def test_a_right_draft_stays_where_it_is_however_close_its_things_stand():
    near = dataclasses.replace(STAR, x=RED_CIRCLE.x, y=RED_CIRCLE.y + (RED_CIRCLE.size + STAR.size) / 2 + 0.01)
    assert not is_free(near, (RED_CIRCLE,))
    result = run(PAIR, (RED_CIRCLE, near))
    assert not result.flaws and result.right.things == (RED_CIRCLE, near)


def test_what_has_to_make_room_is_told():
    """A thing in the middle, so large that no second one fits beside it."""
    wide = Thing("circle", "red", "plain", 0.5, 0.5, 0.45)
    request = Request("position", (Group("circle"), Group("star")), "left of")
    for seed in range(10):
        result = run(request, (wide,), seed=seed)
        changed = {"background"} if result.right.background != "white" else set()
        if language.where(result.right.things[0]) != "middle":
            changed.add("moved")
        # Or all of it is removed and drawn afresh.
        assert changed and set(kinds(result)) in ({"missing"} | changed, {"missing", "extra"})
    text = language.reflect(np.random.default_rng(0), request, flaws=(Flaw("moved", (wide,), (STAR,)),),
                            flawed=result.draft, right=result.right)
    assert "move the red circle at the middle to the bottom right." in text


def test_a_wrong_draft_with_blobs_is_drawn_afresh_as_its_text_says():
    result = repair(np.random.default_rng(0), PAIR, (RED_CIRCLE,), "white", num_blobs=1)
    assert kinds(result) == ["blob"] and not judge(PAIR, result.right.things, result.right.background)
    text = language.reflect(np.random.default_rng(0), PAIR, flaws=result.flaws, flawed=result.draft,
                            right=result.right)
    assert "shapes run into each other" in text and "keep" not in text and "rest" not in text
    for thing in result.right.things:
        assert f"{thing.colour} {thing.shape} at {language.where(thing)}" in text.partition("clear the")[2]
    assert not repair(np.random.default_rng(0), PAIR, (RED_CIRCLE, STAR), "white", num_blobs=1).flaws


def test_the_background():
    request = dataclasses.replace(PAIR, background="pale blue")
    result = run(request, (RED_CIRCLE, STAR), background="grey")
    assert kinds(result) == ["background"] and result.right.background == "pale blue"
    text = language.reflect(np.random.default_rng(0), request, flaws=result.flaws, flawed=result.draft,
                            right=result.right)
    assert "paint the background pale blue" in text and "the background is grey" in text


def test_of_two_flaws_that_take_too_many_words_the_first_is_told():
    four = Request("counting", (Group("circle", 4, "orange"),))
    result = run(four, [Thing("heart", "red", "plain", at, at, 0.3) for at in (0.3, 0.7)])
    assert kinds(result) == ["missing", "extra"]
    text = language.reflect(np.random.default_rng(0), four, flaws=result.flaws, flawed=result.draft,
                            right=result.right)
    assert "missing" in text and "too many" not in text and len(text.split()) <= language.MAX_WORDS + 30


def test_what_cannot_be_mended_is_drawn_afresh(monkeypatch):
    monkeypatch.setattr("data_pipelines.shapes.repair.TRIES", 0)
    assert kinds(run(PAIR, (RED_CIRCLE,))) == ["missing", "extra"]
    assert run(PAIR, (RED_CIRCLE, STAR)).flaws == ()


def test_an_empty_draft():
    result = run(PAIR, ())
    assert kinds(result) == ["missing"] and len(result.flaws[0].wanted) == 2
