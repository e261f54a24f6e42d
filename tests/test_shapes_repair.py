"""The painter: whatever a draft shows, the repaired scene is right and allowed; the flaws are true."""

import dataclasses
import itertools
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shapes import language, reflections
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.repair import repair
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Group, Request, Scene, Thing, is_free
from data_pipelines.shapes.split import is_training

RED_CIRCLE = Thing("circle", "red", "plain", 0.25, 0.3, 0.3)
STAR = Thing("star", "yellow", "plain", 0.75, 0.7, 0.3)
PAIR = Request("color_attr", (Group("circle", colour="red"), Group("star", colour="yellow")))


def run(request, things, background="white", seed=0, planned=None, **more):
    planned = planned or sample_scene(np.random.default_rng(seed), request, split="train")
    return repair(request, planned, things, background, **more)


def plan(*things, background="white"):
    return Scene("color_attr", things, background)


def critique(request, result):
    """A reflection that says what is wrong."""
    texts = (reflections.reflect(np.random.default_rng(seed), request, result) for seed in itertools.count())
    return next(text for text in texts if "so no, " in text)


def kinds(result):
    return [flaw.kind for flaw in result.flaws]


anything = st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(COLOURS),
                     st.sampled_from(("plain", "striped")), *[st.floats(0.1, 0.9)] * 2, st.floats(0.15, 0.6))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(anything, max_size=7), st.sampled_from(BACKGROUNDS))
def test_any_draft_becomes_a_right_scene(seed, things, background):
    rng = np.random.default_rng(seed)
    request = sample_request(rng, split="train")
    planned = sample_scene(rng, request, split="train")
    result = repair(request, planned, things, background)
    assert not judge(request, result.right.things, result.right.background) and is_training(result.right)
    assert len(result.right.things) == request.num_things or not result.flaws
    assert result.flaws == () or all(is_free(thing, result.right.things[:i])
                                     for i, thing in enumerate(result.right.things))
    is_same = not result.flaws and all(
        (one.shape, one.colour, one.texture) == (other.shape, other.colour, other.texture)
        and abs(one.size - other.size) < 1e-3 for one, other in zip(result.right.things, things))
    assert is_same or result.flaws
    assert result.flaws or not judge(request, things, background)
    text = reflections.reflect(rng, request, result)
    assert len(text.split()) <= 170   # of seven things
    assert all(text.count(heading) == 1 for heading in reflections.HEADINGS)


def test_a_draft_with_one_flaw_is_repaired_by_undoing_it():
    same, undone, asked = 0, 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        request = sample_request(rng, split="train")
        right = sample_scene(rng, request, split="train")
        flawed, flaw = make_flawed(rng, request, right, split="train")
        result = repair(request, right, flawed.things, flawed.background)
        assert result.flaws
        asked += 1
        undone += result.right == right
        same += kinds(result) == [flaw.kind]
    assert min(same, undone) / asked > 0.8


def test_what_nobody_asked_for_may_be_as_it_is():
    star = dataclasses.replace(STAR, colour="green", texture="striped", x=0.25)
    result = run(PAIR, (star, RED_CIRCLE), "grey", planned=plan(RED_CIRCLE, STAR))
    assert kinds(result) == ["colour"]
    assert result.right == Scene("color_attr", (RED_CIRCLE, dataclasses.replace(star, colour="yellow")), "grey")


def test_a_thing_that_is_missing_goes_where_there_is_room():
    wanted = plan(RED_CIRCLE, dataclasses.replace(STAR, shape="diamond", colour="green"), background="grey")
    assert is_training(wanted)
    request = Request("two_object", (Group("circle"), Group("diamond")))
    circle = dataclasses.replace(RED_CIRCLE, x=0.7, y=0.7)    # where the wanted scene has the other
    kept, other = run(request, (circle,), "grey", planned=wanted).right.things
    assert kept == circle and is_free(other, (circle,))
    assert dataclasses.replace(other, x=STAR.x, y=STAR.y) == wanted.things[1]


def test_a_thing_on_the_wrong_side_moves_and_keeps_its_looks():
    request = Request("position", (Group("circle"), Group("star")), "left of")
    planned = Scene("position", (dataclasses.replace(RED_CIRCLE, colour="blue"), STAR), "white")
    result = run(request, (dataclasses.replace(RED_CIRCLE, x=0.8, y=0.2), STAR), planned=planned)
    circle, star = result.right.things
    assert {circle.colour, star.colour} == {"red", "yellow"} and kinds(result) == ["moved"]


def test_a_right_draft_need_not_follow_its_plan():
    elsewhere = dataclasses.replace(STAR, x=0.25)
    result = run(PAIR, (STAR, RED_CIRCLE), "grey", planned=plan(RED_CIRCLE, elsewhere))
    assert result.flaws == () and result.right == Scene("color_attr", (STAR, RED_CIRCLE), "grey")


def test_missing_and_too_many():
    other = dataclasses.replace(RED_CIRCLE, shape="cross", colour="green", x=0.7)
    result = run(PAIR, (RED_CIRCLE, other), planned=plan(RED_CIRCLE, STAR))
    assert kinds(result) == ["missing", "extra"]
    three = Request("counting", (Group("circle", 3),))
    planned = plan(*(dataclasses.replace(RED_CIRCLE, y=y, size=0.26) for y in (0.18, 0.5, 0.82)))
    result = run(three, (planned.things[1],), planned=planned)
    assert kinds(result) == ["missing"] and result.flaws[0].wanted == planned.things[::2]


def test_swapped_colours_are_two_colour_flaws():
    wrong = (dataclasses.replace(RED_CIRCLE, colour="yellow"), dataclasses.replace(STAR, colour="red"))
    assert kinds(run(PAIR, wrong, planned=plan(RED_CIRCLE, STAR))) == ["colour", "colour"]


def test_two_things_that_changed_places():
    request = Request("position", (Group("circle"), Group("star")), "right of")
    planned = plan(dataclasses.replace(RED_CIRCLE, x=STAR.x), dataclasses.replace(STAR, x=RED_CIRCLE.x, y=0.3))
    drawn = (RED_CIRCLE, dataclasses.replace(STAR, y=0.3))
    assert kinds(run(request, drawn, planned=planned)) == ["place"]
    above = dataclasses.replace(request, relation="above")
    high = plan(dataclasses.replace(RED_CIRCLE, y=0.2), STAR)
    assert kinds(run(above, (dataclasses.replace(RED_CIRCLE, y=STAR.y), STAR), planned=high)) == ["moved"]


def test_a_right_draft_stays_where_it_is_however_close_its_things_stand():
    near = dataclasses.replace(STAR, x=RED_CIRCLE.x, y=RED_CIRCLE.y + (RED_CIRCLE.size + STAR.size) / 2 + 0.01)
    assert not is_free(near, (RED_CIRCLE,))
    result = run(PAIR, (RED_CIRCLE, near))
    assert not result.flaws and result.right.things == (RED_CIRCLE, near)


def test_a_wrong_draft_with_blobs_is_drawn_afresh_as_its_text_says():
    planned = plan(RED_CIRCLE, STAR)
    result = run(PAIR, (RED_CIRCLE,), planned=planned, num_blobs=1)
    assert kinds(result) == ["blob"] and result.right == planned
    text = critique(PAIR, result)
    assert "shapes run into each other" in text and "keep" not in text and "rest" not in text
    assert reflections.REDRAW in text
    assert not run(PAIR, (RED_CIRCLE, STAR), num_blobs=1).flaws


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(anything, max_size=5))
def test_the_final_prompt_tells_all_of_the_right_scene(seed, things):
    rng = np.random.default_rng(seed)
    request = sample_request(rng, split="train")
    result = run(request, things, seed=seed)
    text = reflections.reflect(rng, request, result)
    final = text.partition(reflections.HEADINGS[2])[2]
    assert final.startswith(f"\n{language.plainly(request)} ")
    for thing in result.right.things:
        assert re.search(rf"{language.where(thing)}: [a-z ]*{thing.colour} {thing.shape};", final)
    assert f"{result.right.background} background" in final


def test_the_background():
    request = dataclasses.replace(PAIR, background="pale blue")
    planned = plan(RED_CIRCLE, STAR, background="pale blue")
    result = run(request, (RED_CIRCLE, STAR), background="grey", planned=planned)
    assert kinds(result) == ["background"] and result.right == planned
    text = critique(request, result)
    assert "paint the background pale blue" in text and "the background is grey" in text


def test_where_most_is_missing_all_is_drawn_afresh():
    four = Request("counting", (Group("circle", 4, "orange"),))
    result = run(four, [Thing("heart", "red", "plain", at, at, 0.3) for at in (0.3, 0.7)])
    assert kinds(result)[:2] == ["missing", "extra"]
    text = critique(four, result)
    assert "four things are missing" in text and f"\n{reflections.REDRAW}" in text and "keep" not in text


def test_an_empty_draft():
    result = run(PAIR, (), planned=plan(RED_CIRCLE, STAR))
    assert kinds(result) == ["missing"] and len(result.flaws[0].wanted) == 2
