"""The conversations: each mode's sequence and losses, determinism, and nothing held out in them."""

import base64
import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shapes import crew, language, records
from data_pipelines.shapes.detect import detect, detect_background
from data_pipelines.shapes.records import BASE_MODES, MODES, generator, heldout_prompts, record
from data_pipelines.shapes.scene import CATEGORIES, Request, Scene
from data_pipelines.shapes.score import score
from data_pipelines.shapes.split import combinations, held_out_keys, is_held_out

# s system, p prompt, q question; t text, i image; * loss; +ae, +vit how an image is looked at.
SEQUENCES = {
    "initial_thinking_understanding": "s p [i+vae+vit] q [t*]",
    "initial_thinking_generation": "s p [t*]",
    "initial_full": "s p [t* i*]",
    "improving_thinking_understanding": "s p [i+vae+vit i+vae+vit] q [t*]",
    "improving_thinking_generation": "s p [t i+vae+vit t*]",
    "improving_full": "s p [t i+vae+vit t* i*]",
    "text_to_image": "p [i*]",
    "understanding": "[i+vit] q [t*] q [t*] q [t*]",
    "description": "s p [t* i*]",
    "editing": "[i+vae+vit] q [i*]",
    "captioned": "p [i*]",
    "captioning": "[i+vit] q [t*]",
    "reading": "p q [t*] q [t*] q [t*]",
    "naming": "s p [t*]",
    "mending": "[i+vae+vit] q [i*]",
    "medley": "p [i*]",
    "verifying": "[i+vit] q [t*]",
    "reviewing": "[i+vit] q [t*]",
    "comparing": "p q [t*]",
    "rephrasing": "p q [t*]",
}


def spell(turns) -> str:
    """A conversation as a string like those above."""
    words = []
    fixed = {language.SYSTEM_PROMPT: "s", language.HOW_TO_THINK: "q", language.HOW_TO_IMPROVE: "q"}
    for turn in turns:
        if turn["role"] == "user":
            assert set(turn) == {"role", "content"} and isinstance(turn["content"], str)
            is_first = all(word == "s" for word in words)
            words.append(fixed.get(turn["content"], "p" if is_first else "q"))
            continue
        assert turn["role"] == "assistant"
        parts = []
        for part in turn["content"]:
            flags = {name for name, value in part.items() if value is True}
            views = "".join(f"+{name}" for name in ("vae", "vit") if f"need_{name}" in flags)
            parts.append(part["type"][0] + views + ("*" if "need_loss" in flags else ""))
        words.append(f"[{' '.join(parts)}]")
    return " ".join(words)


def images(turns) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part["content"], validate=True))))
            for turn in turns if turn["role"] == "assistant"
            for part in turn["content"] if part["type"] == "image"]


def test_modes_are_those_of_the_paper_and_the_base():
    assert MODES + BASE_MODES == tuple(SEQUENCES)


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("mode", SEQUENCES)
def test_sequence_losses_and_images(mode, side):
    for index in range(10):
        turns = json.loads(json.dumps(record(mode, generator(0, mode, index), side=side)))
        said = spell(turns)
        # An edit may come late in a conversation.
        assert (said.lstrip("pq ") if mode in ("editing", "mending") else said) == SEQUENCES[mode]
        for image in images(turns):
            assert image.shape == (side, side, 3) and image.dtype == np.uint8
            assert detect(image)
        for turn in turns:
            for part in turn["content"] if turn["role"] == "assistant" else ():
                views = {"need_vae", "need_vit"} if part["type"] == "image" else set()
                assert set(part) == {"type", "content", "need_loss"} | views


def test_thoughts_stand_in_tags():
    for mode in MODES + ("description",):
        for turn in record(mode, generator(3, mode, 0)):
            for part in turn["content"] if turn["role"] == "assistant" else ():
                if part["type"] == "text":
                    assert part["content"].startswith("<think>")
                    assert part["content"].endswith("</think>")


def test_a_record_depends_on_seed_mode_and_index_only():
    first = record("improving_full", generator(7, "improving_full", 4))
    record("initial_full", generator(7, "initial_full", 0))
    assert record("improving_full", generator(7, "improving_full", 4)) == first
    others = [(8, "improving_full", 4), (7, "initial_full", 4), (7, "improving_full", 5)]
    assert all(record("improving_full", generator(*other)) != first for other in others)


@pytest.fixture
def drawn_scenes(monkeypatch):
    """Every scene that becomes a picture, instead of the pictures."""
    scenes: list[Scene] = []

    def note(scene, *, side):
        scenes.append(scene)
        return np.zeros((side, side, 3), np.uint8)

    for module in (records, crew):    # what the base drew, and what the painter paints
        monkeypatch.setattr(module, "render", note)
    return scenes


@pytest.mark.parametrize("mode", SEQUENCES)
def test_no_training_picture_shows_a_held_out_combination(mode, drawn_scenes):
    for index in range(600):
        record(mode, generator(1, mode, index), split="train")
    if mode not in ("initial_thinking_generation", "reading", "naming", "comparing", "rephrasing"):
        assert len(drawn_scenes) >= 600
    forbidden = held_out_keys()
    assert not [scene for scene in drawn_scenes if combinations(scene) & forbidden]


def test_no_training_picture_shows_one_to_the_detector_either():
    forbidden = held_out_keys()
    for index in range(150):
        for image in images(record("improving_full", generator(2, "improving_full", index))):
            seen = Scene("counting", tuple(detect(image)), detect_background(image))
            assert not combinations(seen) & forbidden


def test_some_first_pictures_are_already_right():
    pairs = [images(record("improving_full", generator(5, "improving_full", index)))
             for index in range(200)]
    same = np.mean([np.array_equal(*pair) for pair in pairs])
    assert 0.15 < same < 0.35


def test_heldout_prompts_are_distinct_balanced_and_held_out():
    prompts = heldout_prompts(540, seed=3)
    requests = [Request.from_json(row["request"]) for row in json.loads(json.dumps(prompts))]
    assert len(set(requests)) == 540
    assert len({row["id"] for row in prompts}) == 540
    assert collections.Counter(row["category"] for row in prompts) == dict.fromkeys(CATEGORIES, 90)
    assert all(is_held_out(request) for request in requests)
    assert prompts[:60] == heldout_prompts(60, seed=3)
    assert prompts[:60] != heldout_prompts(60, seed=4)


def test_more_prompts_than_there_are():
    with pytest.raises(ValueError, match="only 90 held-out requests of category single_object"):
        heldout_prompts(1200)


def test_heldout_records_fulfil_their_prompt():
    # Held-out pictures exist for looking at and for tests; they too must be right.
    for index in range(30):
        story = records._sample_story(generator(0, "initial_full", index), "heldout")
        turns = record("initial_full", generator(0, "initial_full", index), split="heldout")
        assert turns[1]["content"] == story.prompt and is_held_out(story.request)
        assert score(story.request, images(turns)[0]).correct


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'initial'"):
        record("initial", generator(0, "initial", 0))
