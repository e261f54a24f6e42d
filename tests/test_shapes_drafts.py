"""Drafts: written and read back whole, refused when changed, and made into improving records."""

import base64
import dataclasses
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipelines.config import BuildConfig
from data_pipelines.shapes import build as shapes_build
from data_pipelines.shapes.build import build
from data_pipelines.shapes.detect import detect
from data_pipelines.shapes.drafts import (
    SCHEMA,
    Draft,
    SeenDraft,
    finish,
    look_at,
    order_draft,
    read_drafts,
    write_part,
)
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.records import MODES, generator, record
from data_pipelines.shapes.render import render
from data_pipelines.shapes.repair import repair_draft
from data_pipelines.shapes.scene import Group, Request, Scene, Thing
from data_pipelines.shapes.score import score
from data_pipelines.shapes.sketch import sketch
from data_pipelines.sources import ParquetRows
from irg_jax.sampling import drafting
from irg_jax.sampling.config import SamplingConfig, TextConfig

HELD_OUT = Scene("colors", (Thing("circle", "green", "plain", 0.5, 0.5, 0.4),), "white")


def draw(index: int) -> Draft:
    """A picture with one flaw, as a base model might draw it."""
    rng = generator(3, "draft", index)
    order = order_draft(rng)
    return Draft(*order, render(make_flawed(rng, order.request, order.wanted, split="train")[0]))


@pytest.fixture(scope="module")
def drafts():
    return [draw(index) for index in range(12)]


@pytest.fixture
def folder(tmp_path, drafts):
    path = tmp_path / "drafts"
    path.mkdir()
    write_part(path / "0000.parquet", drafts[:8])
    write_part(path / "0001.parquet", drafts[8:])
    finish(path, checkpoint="abc")
    return path


def pictures(turns) -> list[np.ndarray]:
    parts = [part for turn in turns if turn["role"] == "assistant" for part in turn["content"]]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part["content"]))))
            for part in parts if part["type"] == "image"]


def test_an_order_is_the_same_but_for_how_the_base_thinks():
    pairs = [[order_draft(generator(3, "draft", index), is_planned=is_planned) for is_planned in (True, False)]
             for index in range(60)]
    assert all((plan.prompt, plan.request, plan.wanted) == (plain.prompt, plain.request, plain.wanted)
               for plan, plain in pairs)
    differing = [(plan, plain) for plan, plain in pairs if plan.thought != plain.thought]
    assert 20 < len(differing) < 50
    assert all(" and " in plain.thought for _, plain in differing)


def test_what_is_written_is_read(folder, drafts):
    for one, other in zip(read_drafts(folder), drafts, strict=True):
        assert one[:4] == other[:4]
        np.testing.assert_array_equal(one.image, other.image)


def test_a_changed_or_unfinished_folder_is_refused(folder):
    data = bytearray((folder / "0001.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "0001.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="0001.parquet is not the file that the manifest names"):
        read_drafts(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished drafts"):
        read_drafts(folder)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("improving")])
def test_an_improving_record_starts_from_its_draft(mode, drafts):
    for index, one in enumerate(look_at(drafts)):
        turns = record(mode, generator(0, mode, index), draft=one)
        first, *rest = pictures(turns)
        np.testing.assert_array_equal(first, one.draft.image)
        assert turns[1]["content"] == one.draft.prompt
        if mode != "improving_thinking_understanding":
            assert turns[2]["content"][0]["content"] == one.draft.thought
        assert all(score(one.draft.request, image).correct for image in rest)


def right_drafts():
    """Crooked, as the model draws them."""
    orders = [order_draft(generator(3, "right", index)) for index in range(24)]
    drafts = [Draft(*order, sketch(np.random.default_rng(0), render(order.wanted))) for order in orders]
    return [one for one in look_at(drafts) if not repair_draft(one).flaws]


def test_what_is_right_stays_as_it_was_drawn_down_to_the_pixel():
    kept = 0
    for index, seen in enumerate(seen_right := right_drafts()):
        first, second = pictures(turns := record("mending", generator(0, "mending", index), draft=seen))
        np.testing.assert_array_equal(first, seen.draft.image)
        is_kept = "draw the same picture again" in str(turns)
        assert np.array_equal(second, seen.draft.image) == is_kept
        kept += is_kept
    assert len(seen_right) > kept > 5


@pytest.mark.parametrize("mode", ["improving_thinking_understanding", "improving_full"])
def test_what_is_right_is_drawn_once_more_clean_and_where_it_is(mode):
    for index, seen in enumerate(right_drafts()):
        first, second = pictures(record(mode, generator(0, mode, index), draft=seen))
        np.testing.assert_array_equal(first, seen.draft.image)
        drawn = detect(second)
        assert len(drawn) == len(seen.things)
        for one in seen.things:
            assert any((one.shape, one.colour) == (other.shape, other.colour)
                       and max(abs(one.x - other.x), abs(one.y - other.y)) < 0.1 for other in drawn)


def test_a_review_is_of_the_draft_itself(drafts):
    for index, one in enumerate(look_at(drafts)):
        turns = record("reviewing", generator(0, "reviewing", index), draft=one)
        [picture] = pictures(turns)
        np.testing.assert_array_equal(picture, one.draft.image)
        [answer] = [part["content"] for part in turns[2]["content"]]
        assert answer.endswith(" so yes.") == (not judge(one.draft.request, one.things, one.background))


def test_initial_records_do_not_see_drafts(drafts):
    one = SeenDraft(drafts[0], (), "white")
    assert (record("initial_full", generator(0, "x", 0), draft=one)
            == record("initial_full", generator(0, "x", 0)))


@pytest.mark.parametrize("column, change, message", [
    ("wanted", lambda scene: scene["things"][0].update(x=7.5), r"scene.things\[0\].x is 7.5"),
    ("wanted", lambda scene: scene.update(things=[]), "the scene that is wanted does not fulfil the request"),
    ("wanted", lambda scene: scene.update(HELD_OUT.to_json()), "the scene that is wanted does not"),
    ("wanted", lambda scene: scene.update(things="none"), "scene.things is 'none': give a list"),
    ("wanted", lambda scene: scene["things"][0].update(shape="cube"), r"scene.things\[0\].shape is 'cube'"),
])
def test_a_scene_that_cannot_be_is_named(folder, column, change, message):
    table = pyarrow.parquet.read_table(folder / "0001.parquet").to_pylist()
    scene = json.loads(table[2][column])
    change(scene)
    table[2][column] = json.dumps(scene)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "0001.parquet")
    finish(folder)
    with pytest.raises(ValueError, match=f"0001.parquet row 2: {message}"):
        read_drafts(folder)


@pytest.mark.parametrize("column", ["prompt", "thought"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_text_that_is_missing_is_named(folder, column, value):
    table = pyarrow.parquet.read_table(folder / "0000.parquet").to_pylist()
    table[5][column] = value
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema=SCHEMA), folder / "0000.parquet")
    finish(folder)
    with pytest.raises(ValueError, match="0000.parquet row 5: a prompt or a thought is missing"):
        read_drafts(folder)


def test_drafts_that_show_what_is_held_out_are_left_out(drafts):
    request = Request("single_object", (Group("circle"),))
    shown = Draft("a circle", request, "<think>a circle.</think>", HELD_OUT, render(HELD_OUT))
    assert [one.draft for one in look_at([drafts[0], shown])] == [drafts[0]]


def test_some_thoughts_miss_the_request_and_what_is_wanted_never():
    orders = [order_draft(generator(4, "draft", index)) for index in range(300)]
    assert all(not judge(order.request, order.wanted.things, order.wanted.background) for order in orders)
    names = lambda order: all(f"{thing.colour} {thing.shape}" in order.thought for thing in order.wanted.things)
    assert 250 < sum(map(names, orders)) < 300


def test_a_data_set_is_built_from_drafts(folder, drafts, tmp_path, monkeypatch):
    config = BuildConfig(counts={"improving_full": 30, "initial_full": 3}, num_heldout_prompts=6,
                         drafts=str(folder))
    assert build(config, out=tmp_path / "data")
    rows = ParquetRows(tmp_path / "data" / "train" / "improving_full")
    usable = look_at(drafts)
    for index in range(30):
        first, _ = pictures(json.loads(rows[index].text))
        np.testing.assert_array_equal(first, usable[index % len(usable)].draft.image)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["drafts_used"] == len(usable) and manifest["drafts"]
    assert not build(config, out=tmp_path / "data")
    assert build(config, out=tmp_path / "by_processes", workers=2)
    assert json.loads((tmp_path / "by_processes" / "manifest.json").read_text()) == manifest
    monkeypatch.setattr(shapes_build, "look_at", lambda drafts: [])
    with pytest.raises(ValueError, match="every draft shows a held-out combination"):
        build(config, out=tmp_path / "other")


class Drawer:
    """Stands for a generator: draws the same picture for all, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def begin(self, prompts, *, seeds):
        return tuple(prompts), tuple(seeds)

    def think(self, state, texts):
        assert all(text.startswith("<think>") for text in texts)
        return texts, (*state, tuple(texts))

    def draw(self, state):
        self.asked.append(state)
        return np.stack([np.full((64, 64, 3), seed % 256, np.uint8) for seed in state[1]])


def test_the_command_draws_every_prompt_once_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(drafting, "PER_FILE", 4)
    whole, half = Drawer(), Drawer()
    for folder in ("whole", "half"):
        drafting.claim(tmp_path / folder, {"num": 10})
    drafting.draw_drafts(whole, 10, seed=1, batch_size=3, out=tmp_path / "whole")
    drafting.draw_drafts(half, 10, seed=1, batch_size=3, out=tmp_path / "half")
    (tmp_path / "half" / "0001.parquet").unlink()
    again = Drawer()
    drafting.draw_drafts(again, 10, seed=1, batch_size=3, out=tmp_path / "half")
    assert len(again.asked) == 2 and set(again.asked) <= set(whole.asked)
    for folder in ("whole", "half"):
        finish(tmp_path / folder)
    found = [read_drafts(tmp_path / folder) for folder in ("whole", "half")]
    assert len(found[0]) == 10 == len({draft.prompt for draft in found[0]})
    assert [draft[:4] for draft in found[0]] == [draft[:4] for draft in found[1]]


def test_settings_that_no_draft_needs_may_change(tmp_path, monkeypatch):
    monkeypatch.setattr(drafting, "load_generator", lambda *_, **__: (Drawer(), {"sha256": "abc"}))
    config = SamplingConfig(height=64, width=64)
    make = lambda config: drafting.make_drafts("x", config, 2, seed=1, out=tmp_path / "drafts")
    assert make(config)
    guided = dataclasses.replace(config.turn2, cfg_text_scale=2.0)
    assert not make(dataclasses.replace(config, turn2=guided, num_turns=4, text=TextConfig(temperature=1.0)))
    with pytest.raises(ValueError, match="other drafts"):
        make(dataclasses.replace(config, turn1=guided))


def test_another_folder_is_not_drawn_into(tmp_path):
    drafting.claim(tmp_path / "a", {"num": 1})
    drafting.claim(tmp_path / "a", {"num": 1})
    with pytest.raises(ValueError, match="other drafts"):
        drafting.claim(tmp_path / "a", {"num": 2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="something else than drafts"):
        drafting.claim(tmp_path / "b", {"num": 1})
