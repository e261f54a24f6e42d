"""What is said about scenes: true, short, and in one small vocabulary."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from data_pipelines.shapes import language, reflections
from data_pipelines.shapes.flaws import Flaw, Repair, make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.repair import repair
from data_pipelines.shapes.sample import SPLITS, sample_request, sample_scene
from data_pipelines.shapes.scene import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Group,
    Request,
    Scene,
    Thing,
    holds,
)

RED_CIRCLES = (Thing("circle", "red", "plain", 0.2, 0.2, 0.27),
               Thing("circle", "red", "striped", 0.2, 0.8, 0.27))
SQUARE = Thing("square", "blue", "plain", 0.8, 0.5, 0.4)
REQUEST = Request("position", (Group("circle", 2, "red"), Group("square", 1, "blue")), "left of")
SCENE = Scene("position", (*RED_CIRCLES, SQUARE), "pale pink")
FINAL = ("two red circles left of a blue square. top left: red circle; bottom left: striped red circle; "
         "right: blue square; pale pink background.")


def critique(repair: Repair, request: Request = REQUEST) -> str:
    """A reflection that says what is wrong."""
    texts = (reflections.reflect(np.random.default_rng(seed), request, repair) for seed in itertools.count())
    return next(text for text in texts if "so no, " in text)


def num_words(text: str) -> int:
    return len(re.sub("</?think>", "", text).split())


@pytest.fixture(scope="module")
def stories():
    rng = np.random.default_rng(0)
    told = []
    for i in range(3000):
        split, category = SPLITS[i % 2], CATEGORIES[i % 6]
        request = sample_request(rng, split=split, category=category)
        scene = sample_scene(rng, request, split=split)
        told.append((rng, request, scene, *make_flawed(rng, request, scene, split=split)))
    return told


@pytest.fixture(scope="module")
def texts(stories):
    """kind -> every text of it."""
    return {
        "prompt": [language.prompt(rng, request) for rng, request, *_ in stories],
        "think": [language.think(rng, scene) for rng, _, scene, *_ in stories],
        "plan": [language.plan(rng, scene, request.relation) for rng, request, scene, *_ in stories],
        "caption": [language.caption(rng, scene) for rng, _, scene, *_ in stories],
        "describe": [language.describe(rng, scene) for rng, _, scene, *_ in stories],
        "reflect": [reflections.reflect(rng, request, repair(request, scene, flawed.things, flawed.background))
                    for rng, request, scene, flawed, _ in stories],
        "praise": [reflections.reflect(rng, request, Repair(scene, scene, ()))
                   for rng, request, scene, *_ in stories],
        "question": [text for rng, _, scene, *_ in stories
                     for text in language.question(rng, scene)],
        "fixed": [language.SYSTEM_PROMPT, language.HOW_TO_THINK, language.HOW_TO_IMPROVE,
                  language.WHAT_IS_WHERE],
    }


@pytest.mark.parametrize("kind, most", [
    ("think", 14), ("plan", 14), ("caption", 30), ("describe", 14), ("reflect", 145), ("praise", 120),
    ("prompt", 30)])
def test_texts_keep_to_their_budget(texts, kind, most):
    assert max(num_words(text) for text in texts[kind]) <= most
    assert num_words(language.SYSTEM_PROMPT) <= 16


def test_the_vocabulary_is_small_and_lower_case(texts):
    everything = " ".join(text for group in texts.values() for text in group)
    for heading in reflections.HEADINGS:
        everything = everything.replace(heading, "")
    words = set(re.findall(r"[\w-]+", everything))
    assert len(words) < 350
    assert everything == everything.lower() and everything.isascii()
    assert set(SHAPES) | set(COLOURS) <= words


def test_prompts_vary_and_are_english(texts):
    prompts = texts["prompt"]
    assert len(set(prompts)) > 0.85 * len(prompts)
    assert not [text for text in prompts if re.search(r"\ba [aeiou]", text)]
    assert not [text for text in prompts if re.search(r"\ban [^aeiou]", text)]
    assert not [text for text in prompts if re.search(r"\{|\}|  | $|None", text)]


def test_a_prompt_says_all_that_is_asked(stories):
    number = {1: "a", 2: "two", 3: "three", 4: "four"}
    for rng, request, *_ in stories:
        text = language.prompt(rng, request)
        for group in request.groups:
            assert re.search(rf"\b{group.shape}(es|s)?\b", text)
            assert number[group.count] in text.split() or group.count == 1
            assert (group.colour or "") in text and (group.texture or "") in text
        assert (request.background or "") in text


def test_the_plainest_prompt_is_the_one_of_the_readme():
    prompts = {language.prompt(np.random.default_rng(seed), REQUEST) for seed in range(300)}
    assert "two red circles left of a blue square" in prompts


def test_a_thought_says_what_there_will_be_and_not_where():
    thoughts = {language.think(np.random.default_rng(seed), SCENE) for seed in range(20)}
    assert thoughts == {"<think>two red circles and a blue square.</think>",
                        "<think>two red circles and a blue square on pale pink.</think>"}


def test_a_plan_says_which_side_of_which_two_kinds_of_things_are():
    told = lambda relation=None, scene=SCENE: {
        language.plan(np.random.default_rng(seed), scene, relation) for seed in range(20)}
    assert told() == told("left of") == {"<think>two red circles left of a blue square.</think>",
                                         "<think>two red circles left of a blue square on pale pink.</think>"}
    corners = Scene("two_object", (Thing("ring", "red", "plain", 0.2, 0.2, 0.25),
                                   Thing("heart", "blue", "plain", 0.9, 0.8, 0.25)), "white")
    assert "<think>a red ring left of a blue heart.</think>" in told(scene=corners)
    assert "<think>a red ring above a blue heart.</think>" in told("above", corners)
    assert "<think>a red ring left of a blue heart.</think>" in told("below", corners)   # does not hold


def test_a_plan_says_no_relation_that_does_not_hold_of_all(stories):
    num_told = 0
    for rng, request, scene, *_ in stories:
        text = language.plan(rng, scene, request.relation)
        kinds = {(thing.colour, thing.shape): [] for thing in scene.things}
        for thing in scene.things:
            kinds[thing.colour, thing.shape].append(thing)
        for relation in RELATIONS:
            if f" {relation} " in text:
                ones, others = kinds.values()
                assert all(holds(relation, one, other) for one in ones for other in others)
                assert request.relation in (None, relation)
                num_told += 1
        assert not any(f"{place}:" in text for place in language.PLACES)
    assert num_told > 500


def test_a_caption_says_where_everything_is_in_any_order():
    items = ["top left: red circle", "bottom left: striped red circle", "right: blue square"]
    texts = {language.caption(np.random.default_rng(seed), SCENE) for seed in range(40)}
    assert texts == {f"{'; '.join(order)}; pale pink background." for order in itertools.permutations(items)}


def test_a_description_counts():
    texts = {language.describe(np.random.default_rng(seed), SCENE) for seed in range(20)}
    assert texts == {"two red circles and a blue square.",
                     "two red circles and a blue square on pale pink."}


@pytest.mark.parametrize("count, word", [(9, "nine"), (10, "many"), (13, "many")])
def test_a_base_model_may_draw_more_things_than_a_scene_has(count, word):
    things = [Thing("circle", "red", "plain", 0.1 + 0.2 * (i % 4), 0.1 + 0.2 * (i // 4), 0.12)
              for i in range(count)]
    crowd = Scene("counting", tuple(things), "white")
    request = Request("single object", (Group("circle", 1, "red"),))
    alone = Scene("single object", (things[0],), "white")
    mended = Repair(crowd, alone, (Flaw("extra", seen=tuple(things[1:])),))
    told = critique(mended, request)
    assert f"there are {language.number(count - 1)} things too many" in told
    rng = np.random.default_rng(0)
    assert f"{word} red circles" in language.think(rng, crowd)
    answers = dict(language.questions(rng, crowd, 5))
    assert answers["how many things are there?"] == answers["how many circles are there?"] == f"{word}."
    missing = Repair(alone, crowd, (Flaw("missing", wanted=tuple(things)),))
    assert f"{word} things are missing" in critique(missing, request)


def test_a_reflection_names_the_flaw_and_the_fix():
    green = Thing("square", "green", "plain", 0.8, 0.5, 0.4)
    draft = Scene("position", (*RED_CIRCLES, green), "pale pink")
    flaw = Flaw("colour", (green,), (SQUARE,))
    text = critique(Repair(draft, SCENE, (flaw,)))
    assert text.startswith("<think>") and text.endswith("</think>")
    lines = text.removeprefix("<think>").removesuffix("</think>").split("\n")
    assert [line for line in lines if line.startswith("#")] == list(reflections.HEADINGS)
    analysis, _, need, _, step, _, final = lines
    assert analysis == (
        "i look at the picture. is it two red circles left of a blue square? "
        "how many red circles are there? two. is there a blue square? no. so no, a square is green.")
    assert need == "the square must be blue."
    assert step.startswith("paint the green square at the right blue. ")
    assert final == FINAL


@pytest.mark.parametrize("flaw, step", [
    (Flaw("missing", (), RED_CIRCLES), "draw a red circle at the top left and a red circle at the "
     "bottom left."),
    (Flaw("extra", (SQUARE,)), "remove the blue square at the right."),
    (Flaw("shape", (Thing("star", "blue", "plain", 0.8, 0.5, 0.4),), (SQUARE,)),
     "turn the blue star at the right into a square."),
    (Flaw("size", (Thing("square", "blue", "plain", 0.8, 0.5, 0.26),), (SQUARE,)),
     "make the blue square at the right larger."),
    (Flaw("texture", (RED_CIRCLES[1],), (RED_CIRCLES[0],)),
     "make the red circle at the bottom left plain."),
    (Flaw("background"), "paint the background pale pink."),
])
def test_the_step_of_each_flaw(flaw, step):
    flawed = Scene("position", SCENE.things, "white")
    assert step in critique(Repair(flawed, SCENE, (flaw,)))


def test_the_look_back_says_what_the_base_says_of_any_picture():
    star = Thing("star", "red", "plain", 0.2, 0.2, 0.27)
    draft = Scene("position", (SQUARE, star), "white")
    flaws = (Flaw("missing", wanted=RED_CIRCLES[1:]), Flaw("shape", (star,), RED_CIRCLES[:1]))
    asked = language.plainly(REQUEST)[:-1]
    _, answer = reflections.doubt(np.random.default_rng(0), REQUEST, flaws, draft, SCENE)
    assert answer == ("how many red circles are there? none, not two. is there a blue square? yes. "
                      "so no, a circle is missing.")
    assert critique(Repair(draft, SCENE, flaws)).startswith(
        f"<think>i look at the picture. is it {asked}? {answer[:-1]} and there is a star that should be "
        "a circle.\n")


def test_nothing_is_said_against_a_right_picture_or_some_of_the_wrong_ones():
    flawed = Repair(Scene("position", RED_CIRCLES, "white"), SCENE, (Flaw("missing", wanted=(SQUARE,)),))
    said = ("<think>i look at the picture.\n### Required improvements\nthe picture must have all things.\n"
            "### Step-by-step modification\ndraw all anew.\n"
            f"### Final prompt\n{FINAL}</think>")
    right, wrong = ([reflections.reflect(np.random.default_rng(seed), REQUEST, repair) for seed in range(200)]
                    for repair in (Repair(SCENE, SCENE, ()), flawed))
    assert set(right) == {said}
    assert 40 < wrong.count(said) < 80
    assert all(text.endswith(f"### Final prompt\n{FINAL}</think>") for text in wrong)


def test_the_final_prompt_follows_the_request_and_then_the_eye():
    """Also of a picture that shows more than was asked for."""
    star = Thing("star", "blue", "plain", 0.5, 0.1, 0.2)
    scene = Scene("position", (star, SQUARE, *RED_CIRCLES[::-1]), "pale pink")
    text = reflections.reflect(np.random.default_rng(0), REQUEST, Repair(scene, scene, ()))
    *_, final = text.removesuffix("</think>").split("\n")
    assert final == FINAL.replace("; pale", "; top: blue star; pale")


def test_the_background_is_asked_for_where_one_was_wanted():
    request = dataclasses.replace(REQUEST, background="pale pink")
    for background, answer in (("pale pink", "pale pink."), ("white", "white, not pale pink.")):
        points = reflections.check(request, dataclasses.replace(SCENE, background=background))
        assert points[-1] == ("what is the colour of the background?", answer, background == "pale pink")


def test_all_points_hold_where_the_judge_finds_no_fault(stories):
    """Also for pictures of other requests."""
    right = collections.Counter()
    for (_, request, scene, flawed, _), (_, _, other, *_) in zip(stories, stories[6:]):   # of the same category
        for kind, shown in {"right": scene, "flawed": flawed, "other": other}.items():
            is_right = not judge(request, shown.things, shown.background)
            points = reflections.check(request, shown)
            assert all(is_met for *_, is_met in points) == is_right
            doubts = [answer for _, answer, _ in points if ", not " in answer or answer in ("none.", "no.")]
            assert is_right == (not doubts)
            right[kind] += is_right
    assert right["right"] == len(stories) - 6 and not right["flawed"] and right["other"]


def test_answers_are_true():
    asked = {}
    for seed in range(1000):
        question, answer = language.question(np.random.default_rng(seed), SCENE)
        asked.setdefault(question, set()).add(answer)
    assert asked["how many circles are there?"] == {"two."}
    assert asked["how many stars are there?"] == {"none."}
    assert asked["what is the colour of the square?"] == {"blue."}
    assert asked["where is the square?"] == {"at the right."}
    assert asked["what is at the right?"] == {"a blue square."}
    assert asked["is there a red circle?"] == {"yes."}
    assert asked["is there a yellow circle?"] == {"no."}
    assert "is there a green circle?" not in asked   # held out
    assert asked["what is the colour of the background?"] == {"pale pink."}
    assert asked["how many things are there?"] == {"three."}
    # There are two circles: asking for the place of one would have no answer.
    assert "where is the circle?" not in asked
