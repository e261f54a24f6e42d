"""The base model's texts without pictures: what they say is so, and holds nothing that is held out."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.shapes import language, reading
from data_pipelines.shapes.records import generator, record
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import COLOURS, SHAPES, plural
from data_pipelines.shapes.split import held_out_keys


def texts_of(turns) -> list[str]:
    return [text for turn in turns for text in (
        [turn["content"]] if turn["role"] == "user" else [
            part["content"] for part in turn["content"] if part["type"] == "text"])]


def scene_of(seed: int):
    rng = np.random.default_rng(seed)
    return rng, sample_scene(rng, sample_request(rng, split="train"), split="train")


@given(st.integers(0, 2**32 - 1))
def test_answers_are_told_by_the_caption_in_its_own_words(seed):
    rng, scene = scene_of(seed)
    caption, asked = reading.read_caption(rng, scene)
    told = set(re.findall(r"[\w#-]+", caption))
    plain = {"yes", "no", "and", "a", "an", "at", "the", "on", *language.NUMBERS}
    assert len({question for question, _ in asked}) == reading.NUM_QUESTIONS
    for question, answer in asked:
        words = set(re.findall(r"[\w#-]+", answer)) - plain
        singular = {re.sub(r"(?<=ss)es$|(?<=[^s])s$", "", word) for word in words}
        assert words <= told or singular <= told, (caption, question, answer)


@given(st.integers(0, 2**32 - 1))
def test_a_renamed_thought_names_only_what_the_prompt_and_the_scene_name(seed):
    rng, scene = scene_of(seed)
    request = sample_request(rng, split="train")
    scene = sample_scene(rng, request, split="train")
    prompt = language.prompt(rng, request)
    renamed, thought = reading.name_things(rng, prompt, scene)
    said = thought.removeprefix("<think>").removesuffix("</think>")
    new = set(re.findall(r"[\w#-]+", said)) & set(reading.OTHER_WORDS)
    assert all(word in renamed for word in new), (renamed, thought)


def test_a_name_is_the_same_in_every_text():
    texts = ["two red rings and a square on pale green", "a ring", "red, squares, pale green."]
    seen = set()
    for seed in range(50):
        first, second, third = reading.rename(np.random.default_rng(seed), texts)
        ring, red = second.removeprefix("a "), third.split(",")[0]
        assert f"two {red} {plural(ring, 2)} and" in first
        assert first.split(" on ")[1] == third.split(", ")[2].removesuffix(".")
        seen.add(first)
    assert len(seen) > 20
    assert not set(reading.OTHER_WORDS) & {*SHAPES, *COLOURS}
    assert len(set(reading.OTHER_WORDS)) == len(reading.OTHER_WORDS)


def test_a_rephrased_prompt_names_what_the_prompt_names():
    new = 0
    for index in range(200):
        prompt, _, plain = texts_of(record("rephrasing", generator(6, "rephrasing", index)))
        others = set(re.findall(r"[\w#-]+", plain)) & set(reading.OTHER_WORDS)
        assert all(word in prompt for word in others), (prompt, plain)
        new += bool(others)
    assert 50 < new < 150


@pytest.mark.parametrize("mode", ["reading", "naming", "understanding", "comparing", "verifying", "reviewing",
                                  "rephrasing", "improving_full"])
def test_no_text_holds_a_held_out_combination(mode):
    pairs = {key[1:] for key in held_out_keys() if key[0] == "colour of shape"}
    forbidden = [f"{colour} {name}" for colour, shape in pairs for name in (shape, plural(shape, 2))]
    counts = {(int(key[1]), key[2]) for key in held_out_keys() if key[0] == "count of shape"}
    forbidden += [f"{language.NUMBERS[count]} {plural(shape, 2)}" for count, shape in counts]
    found = [text for index in range(600) for text in texts_of(record(mode, generator(4, mode, index)))
             if any(re.search(rf"\b{words}\b", text) for words in forbidden)]
    assert not found


def test_reading_order_is_from_the_top_left():
    for seed in range(30):
        _, scene = scene_of(seed)
        places = re.findall(r"([a-z][a-z ]*):", language.caption(None, scene))
        assert len(places) == len(scene.things)
        assert all(language.PLACES.index(one) <= language.PLACES.index(other)
                   for one, other in itertools.pairwise(places))
