"""What curation starts from: prompts, folders of images, texts and first rounds, and the shapes world."""

import io
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from curation_cases import (
    answer,
    contents,
    make_config,
    picture,
    reflection,
    thought,
    write_first_rounds,
    write_prompts,
)
from data_pipelines.check import Wish, check
from data_pipelines.config import DataConfig, GroupConfig, from_config_dict
from data_pipelines.curation import material
from data_pipelines.curation.cases import read_lines, screen
from data_pipelines.curation.config import CurateConfig, FilterConfig
from data_pipelines.curation.critics import show
from data_pipelines.curation.curating import curate, prepare
from data_pipelines.curation.filters import Rules
from data_pipelines.curation.material import Picture, Rejected
from data_pipelines.endpoints import encode
from data_pipelines.images import decode_image
from data_pipelines.records import ImagePart, TextPart, parse_conversation
from data_pipelines.shapes.detect import detect
from data_pipelines.shapes.drafts import order_draft
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.records import generator, heldout_prompts
from data_pipelines.shapes.render import render
from data_pipelines.shapes.scene import Request
from data_pipelines.shapes.score import score
from data_pipelines.sources import ParquetRows
from endpoint_cases import Misbehaving, images_of
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.trajectory import Generator
from irg_jax.serving.config import ServeConfig
from sampling_cases import WIDE, make_model
from serving_cases import served


def read(tmp_path, text, name="prompts.jsonl", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_lines(tmp_path / name, **{"licence": "CC0", **options})


def test_prompts_are_read(tmp_path):
    dog = {"prompt": "a dog", "id": "d", "licence": "MIT", "image": "d.png", "source": "web"}
    one, other = read(tmp_path, '{"prompt": " a cat "}\n\n' + json.dumps(dog))
    assert (one.case.id, one.case.prompt, one.case.licence, one.image) == ("000001", "a cat", "CC0", "")
    assert (other.case.id, other.case.licence, other.image) == ("d", "MIT", "d.png")
    assert other.case.source == {"file": "prompts.jsonl", "line": 3, "source": "web"}
    lines = read(tmp_path, "\ufeffa cat\n\n {\"b\"}\r\n", "prompts.txt")    # as some editors begin a file
    assert [line.case.prompt for line in lines] == ["a cat", '{"b"}']


@pytest.mark.parametrize("text, told", [
    ("", "holds no prompt"), ("\n \n", "holds no prompt"), (b"\xff\xfe", "cannot be read"),
    ("{", "line 1: not valid JSON"), ("[" * 100_000, "line 1: not valid JSON"),
    ("[]", "line 1: a line is a JSON object"),
    ('{"prompt": ""}', "line 1: lacks the field 'prompt'"), ('{"id": "a"}', "lacks the field 'prompt'"),
    ('{"prompt": 3}', "field 'prompt' is 3"),
    ('{"prompt": "a", "promt": 1}', "unknown field 'promt'; did you mean"),
    ('{"prompt": "a", "id": "../a"}', "id '../a' cannot name a file"),
    ('{"prompt": "a", "id": ".a"}', "cannot name a file"), ('{"prompt": "a", "id": ""}', "cannot name a file"),
    ('{"prompt": "a", "request": 3}', "field 'request' is 3"),
    ('{"prompt": "a", "image": ["b"]}', "field 'image'"),
    ('{"prompt": "a", "licence": "\\ud800"}', "field 'licence' is not Unicode"),
    ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "line 2: the id 'x' is that of .*line 1"),
])
def test_wrong_prompts_are_named_by_line(text, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        read(tmp_path, text)


def test_every_record_has_a_licence(tmp_path):
    with pytest.raises(ValueError, match="line 1: no licence is known"):
        read(tmp_path, '{"prompt": "a"}', licence="")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lines(tmp_path / "absent.txt")


@given(st.binary(max_size=200) | st.lists(
    st.dictionaries(st.sampled_from(["prompt", "id", "image", "licence", "request"]),
                    st.none() | st.text() | st.integers() | st.dictionaries(st.text(), st.text())),
    max_size=4).map(lambda lines: "\n".join(map(json.dumps, lines)).encode()))
def test_any_file_is_cases_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    try:
        lines = read_lines(path, licence="CC0")
    except ValueError as error:
        assert "any.jsonl" in str(error)
        return
    assert len({line.case.id for line in lines}) == len(lines) and all(line.case.prompt for line in lines)


def test_what_was_rejected_makes_nothing_a_duplicate(tmp_path):
    """A prompt whose image is a duplicate, and an image whose prompt the hook refuses, come again."""
    for name in "abc":
        Image.fromarray(picture(name)).save(tmp_path / f"{name}.png")
    lines = read(tmp_path, "\n".join(json.dumps({"id": id_, "prompt": prompt, "image": f"{name}.png"}) for
                                     id_, prompt, name in (("1", "a cat", "a"), ("2", "a dog", "a"),
                                                           ("3", "a dog", "b"), ("4", "no!", "c"),
                                                           ("5", "a cow", "c"))))
    rules = Rules(FilterConfig(min_side=1), (), lambda prompt, texts, images: "no" if prompt == "no!" else "")
    screened = screen(lines, folder=tmp_path, rules=rules)
    assert [case.id for case in screened.cases] == ["1", "3", "5"]
    assert [(one.id, one.cause) for one in screened.rejections] == [
        ("2", "duplicate_image"), ("4", "safety: no")]


def curated(config, out):
    return curate(prepare(config, out=out), out=out)


def told(out):
    return {one["id"]: one for one in map(json.loads, open(out / "rejected.jsonl", encoding="utf-8"))}


def records(out, mode):
    source = ParquetRows(out / mode)
    return [parse_conversation(source[i].text, mode=mode, place="") for i in range(len(source))]


def test_broken_first_rounds_lose_the_improving_side_alone(tmp_path):
    prompts = write_prompts(tmp_path / "in", 7)
    first = write_first_rounds(tmp_path / "first", [f"prompt number {number}" for number in range(7)])
    (first / "0000" / "turn1.png").write_bytes(b"no image")
    (first / "0001" / "turn1.txt").write_bytes(b"\xff")
    (first / "0002" / "turn1.txt").write_text(" \n")
    (first / "0003" / "turn1.png").unlink()
    (first / "0003" / "turn1.png").symlink_to("/etc/hostname")
    (first / "0005" / "turn1.txt").write_text("so " * 5000)
    (first / "0004" / "turn1.txt").unlink()
    (first / "0004" / "turn1.txt").mkdir()
    (first / ".0009.partial").mkdir()    # of a generation that was killed
    with Misbehaving(answer).running() as server:
        done = curated(make_config(server.url, prompts, first), tmp_path / "data")
    assert done.rejections == {"broken_first_round": 4, "empty_first_thought": 1,
                               "first_thought_too_long": 1}
    assert done.counts["initial_full"] == 7 and done.counts["improving_full"] == 1
    assert {one["what"] for one in told(tmp_path / "data").values()} == {"improving"}


@pytest.mark.parametrize("text, sentence", [(None, "holds no 0000/prompt.json"), ("{", "cannot be read"),
                                            ("[]", "names no prompt"), ('{"prompt": 3}', "names no prompt")])
def test_a_folder_that_is_none_of_generate_is_told(text, sentence, tmp_path):
    prompts = write_prompts(tmp_path / "in", 1)
    (tmp_path / "first").mkdir()
    if text is not None:
        (tmp_path / "first" / "0000").mkdir()
        (tmp_path / "first" / "0000" / "prompt.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        prepare(make_config("http://127.0.0.1:1/v1", prompts, tmp_path / "first"), out=tmp_path / "data")


def test_folders_alone_make_all_six_modes(tmp_path):
    """Images and texts that somebody has made already: nothing is asked, and bytes stay bytes."""
    prompts = write_prompts(tmp_path / "in", 7)
    names = [f"prompt number {number}" for number in range(7)]
    first = write_first_rounds(tmp_path / "first", names)
    images, texts = tmp_path / "images", tmp_path / "texts"
    images.mkdir(), texts.mkdir()
    Image.fromarray(picture("p000", side=40)).save(images / "p000.jpg", quality=90)
    Image.fromarray(picture("p001", side=40)).save(images / "p001.webp")
    for number in range(2, 6):
        Image.fromarray(picture(f"p00{number}", side=40)).save(images / f"p00{number}.png")
    for number, name in enumerate(names):
        told = thought(f"{name}. The image shows it" if number == 3 else name)
        (texts / f"p00{number}.thought.txt").write_text(told + "\n")
        (texts / f"p00{number}.quality.txt").write_text("good" if number == 5 else "9\n")
        told = "none" if number == 0 else reflection(f"{name}, as in image 2" if number == 4 else name)
        (texts / f"p00{number}.reflection.txt").write_text(told + "\n")
    config = from_config_dict(CurateConfig, {
        "prompts": str(prompts), "licence": "CC0-1.0", "filters": {"min_side": 16, "min_quality": 8.5},
        "painter": {"kind": "folder", "folder": str(images)},
        "critic": {"kind": "folder", "folder": str(texts)},
        "sketcher": {"kind": "folder", "folder": str(first)}, "split": "train", "suffix": ""})
    draft = prepare(config, out=tmp_path / "data")
    assert draft.expenses == []
    done = curate(draft, out=tmp_path / "data")
    assert done.rejections == {"no_image": 1, "reflection_unreadable": 1, "thought_mentions_image": 1,
                               "reflection_mentions_image": 1, "score_unreadable": 1}
    assert done.cases == {"read": 7, "whole": 2, "partly": 3, "rejected": 2}
    jpeg, webp, *_ = records(tmp_path / "data" / "train", "initial_full")
    assert jpeg.parts[-1].data == (images / "p000.jpg").read_bytes()
    assert webp.parts[-1].data == (images / "p001.webp").read_bytes()
    assert not curated(config, tmp_path / "data").written
    (texts / "p000.reflection.txt").write_text(reflection(names[0]))
    with pytest.raises(ValueError, match="another data set .its inputs differ.*--overwrite"):
        curated(config, tmp_path / "data")


def test_a_base_model_behind_endpoints(tmp_path):
    prompts = write_prompts(tmp_path / "in", 3)
    drawn = lambda body: picture(f"base {body['prompt']}")
    with Misbehaving(lambda body: drawn(body) if body["model"] == "base" and "prompt" in body else answer(body)
                     ).running() as server:
        one = {"url": server.url, "model": "base"}
        config = make_config(server.url, prompts, sketcher={"kind": "endpoint", "writer": one, "painter": one})
        draft = prepare(config, out=tmp_path / "data")
        done = curate(draft, out=tmp_path / "data")
        assert {one.what: one.requests for one in draft.expenses} == dict.fromkeys(
            ("first thoughts", "first images", "better images", "thoughts", "reflections"), 3)
        assert len(server.answered) == 15 and set(server.answered.values()) == {1}
        writers = [body for body in server.bodies.values() if "messages" in body and not images_of(body)]
        assert [[turn["role"] for turn in body["messages"]] for body in writers] == [["system", "user"]] * 3
    assert done.cases["whole"] == 3
    parts = records(tmp_path / "data", "improving_full_learning")[0].parts
    assert [part.data for part in parts if isinstance(part, ImagePart)] == [
        encode(picture(f"{who} prompt number 0")) for who in ("base", "better")]


def test_an_image_without_a_thought_is_no_first_round(tmp_path):
    prompts = write_prompts(tmp_path / "in", 2)
    with Misbehaving(answer).running() as server:
        base = {"url": server.url, "model": "base"}    # tells no revised_prompt
        done = curated(make_config(server.url, prompts, sketcher={"kind": "endpoint", "painter": base}),
                       tmp_path / "data")
    assert done.rejections == {"empty_first_thought": 2} and done.cases["partly"] == 2


def test_our_own_server_is_a_base_model_whose_thoughts_come_with_its_images(tmp_path):
    """A small network with random weights: one request gives a first round, and it is the server's own."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two stars\nblue\n")
    generator = Generator(make_model(), WIDE)
    with served(generator, ServeConfig()) as address, Misbehaving(answer).running() as server:
        base = {"url": f"{address}/v1", "model": "small", "options": {"num_turns": 1, "seed": 5}}
        config = make_config(server.url, prompts, modes=("improving_full",),
                             sketcher={"kind": "endpoint", "painter": base, "size": "48x32"})
        draft = prepare(config, out=tmp_path / "data")
        done = curate(draft, out=tmp_path / "data")
    assert {one.what: one.requests for one in draft.expenses} == dict.fromkeys(
        ("first images", "better images", "reflections"), 2)
    assert done.counts["improving_full"] == 2
    turn = trajectories(generator, ["two stars"], num_turns=1, seeds=[5])[0][0]
    parts = records(tmp_path / "data", "improving_full_learning")[0].parts
    assert parts[2].text == turn.text.strip() and not parts[2].need_loss
    drawn = decode_image(parts[3].data, where="", max_pixels=10_000).astype(int)
    assert abs(drawn - turn.image).max() <= 2    # batches differ by rounding


def test_pairs_may_be_improved_if_wanted(tmp_path):
    prompts = write_prompts(tmp_path / "in", 0, num_pairs=2)
    first = write_first_rounds(tmp_path / "first", ["pair number 0", "pair number 1"])
    with Misbehaving(answer).running() as server:
        done = curated(make_config(server.url, prompts, first), tmp_path / "plain")
        assert done.counts["initial_full"] == 2 and done.counts["improving_full"] == 0
        done = curated(make_config(server.url, prompts, first, improve_pairs=True), tmp_path / "improved")
        assert done.counts["improving_full"] == 2
        with pytest.raises(ValueError, match="none of 2 cases was taken: no_mode 2"):
            curated(make_config(server.url, prompts, first, modes=("improving_full",)), tmp_path / "none")


def test_large_images_are_shown_smaller_and_kept_as_they_are(tmp_path):
    prompts = write_prompts(tmp_path / "in", 0, num_pairs=1)
    Image.fromarray(picture("large", side=300)).resize((300, 150)).save(tmp_path / "in" / "images" / "0.png")
    with Misbehaving(answer).running() as server:
        endpoint = {"url": server.url, "model": "critic"}
        critic = {"endpoint": endpoint, "max_side": 100}
        curated(make_config(server.url, prompts, critic=critic), tmp_path / "data")
        shown, = [image.shape for body in server.bodies.values() for image in images_of(body)]
    assert shown == (50, 100, 3)
    kept = records(tmp_path / "data", "initial_full_learning")[0].parts[-1]
    assert kept.data == (tmp_path / "in" / "images" / "0.png").read_bytes()


def test_what_is_sent_of_an_image(tmp_path, monkeypatch):
    """Plain PNG goes as it is; transparency is laid over white first; readers' limits hold."""
    plain, clear = encode(picture("plain")), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(clear, "PNG")
    (tmp_path / "plain.png").write_bytes(plain)
    (tmp_path / "clear.png").write_bytes(clear.getvalue())
    read = lambda name: Picture.read(tmp_path / name, (tmp_path / name).read_bytes())
    assert show(read("plain.png"), 32) == plain and show(read("plain.png"), 16).shape == (16, 16, 3)
    assert (show(read("clear.png"), 32) == 255).all()
    assert material.MAX_PIXELS == DataConfig.max_image_pixels
    for name, limit in (("MAX_IMAGE_BYTES", len(plain) - 1), ("MAX_PIXELS", 63)):
        with monkeypatch.context() as patched, pytest.raises(Rejected) as rejected:
            patched.setattr(material, name, limit)
            read("plain.png")
        assert rejected.value.cause == "large_image"


def shapes_inputs(folder, num):
    """Prompts with what they ask for, and what a base drew: every second picture has a flaw."""
    lines, prompts = [], []
    for number in range(num):
        rng = generator(3, "curation", number)
        order = order_draft(rng)
        if order.prompt in prompts:
            continue
        flawed, _ = make_flawed(rng, order.request, order.wanted, split="train")
        home = folder / "first" / f"{len(prompts):04d}"
        home.mkdir(parents=True)
        Image.fromarray(render(flawed if number % 2 else order.wanted, side=64)).save(home / "turn1.png")
        (home / "turn1.txt").write_text(order.thought + "\n")
        (home / "prompt.json").write_text(json.dumps({"prompt": order.prompt}))
        prompts.append(order.prompt)
        lines.append({"prompt": order.prompt, "request": order.request.to_json()})
    held = heldout_prompts(1)[0]
    lines.append({"id": "held", "prompt": held["prompt"], "request": held["request"]})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


SHAPES_FILTERS = {"min_side": 0, "max_similarity": 1.0, "near_bits": -1, "min_thought_chars": 1,
                  "min_reflection_chars": 1, "min_quality": 9.0}


def test_the_shapes_world_is_curated_by_the_same_command(tmp_path):
    """First rounds are looked at by the detector; what the renderer paints fulfils the prompt."""
    lines = shapes_inputs(tmp_path, 40)
    config = from_config_dict(CurateConfig, {
        "prompts": str(tmp_path / "prompts.jsonl"), "licence": "Apache-2.0", "suffix": "",
        "sketcher": {"kind": "folder", "folder": str(tmp_path / "first")}, "painter": {"kind": "shapes"},
        "critic": {"kind": "shapes"}, "filters": SHAPES_FILTERS})
    done = curated(config, tmp_path / "data")
    assert done.rejections.pop("held_out") >= 1 and done.cases["whole"] >= 30 and not done.rejections
    wanted = {line["prompt"]: Request.from_json(line["request"]) for line in lines}
    num_wrong = 0
    for record in records(tmp_path / "data", "improving_full"):
        texts = [part.text for part in record.parts if isinstance(part, TextPart)]
        first, better = (part.data for part in record.parts if isinstance(part, ImagePart))
        assert score(wanted[texts[1]], decode_image(better, where="", max_pixels=10_000)).correct
        num_wrong += not score(wanted[texts[1]], decode_image(first, where="", max_pixels=10_000)).correct
        final = texts[-1].split("### Final prompt\n")[1]
        for thing in detect(decode_image(better, where="", max_pixels=10_000)):
            assert f"{thing.colour} {thing.shape}" in final
    assert num_wrong >= 10    # and what was right stays so
    groups = check(tmp_path / "data", Wish(DataConfig(source="", groups=(GroupConfig("any"),))), workers=1)
    assert len(groups) == 6 and not any(group.faults for group in groups.values())
    again = tmp_path / "again"
    curated(config, again)
    assert contents(again) == contents(tmp_path / "data")


def test_a_picture_that_is_not_square_is_a_cause_of_the_shapes_world(tmp_path):
    shapes_inputs(tmp_path, 4)
    Image.new("RGB", (64, 48)).save(tmp_path / "first" / "0001" / "turn1.png")
    config = from_config_dict(CurateConfig, {
        "prompts": str(tmp_path / "prompts.jsonl"), "licence": "Apache-2.0", "suffix": "",
        "sketcher": {"kind": "folder", "folder": str(tmp_path / "first")}, "painter": {"kind": "shapes"},
        "critic": {"kind": "shapes"}, "filters": SHAPES_FILTERS})
    assert curated(config, tmp_path / "data").cases["whole"] >= 2
    assert told(tmp_path / "data")["000002"]["cause"] == "not_square"
    assert told(tmp_path / "data")["000002"]["told"] == "64 x 48 pixels"


@pytest.mark.parametrize("line, sentence", [({"prompt": "a"}, "lacks the field 'request'"),
                                            ({"prompt": "a", "request": {"category": 3}}, "request")])
def test_prompts_without_a_request_are_none_of_the_shapes_world(line, sentence, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    config = CurateConfig(str(tmp_path / "prompts.jsonl"), licence="x",
                          **{name: from_config_dict(CurateConfig.__annotations__[name], {"kind": "shapes"})
                             for name in ("critic", "painter")})
    with pytest.raises(ValueError, match=sentence):
        prepare(config, out=tmp_path / "data")
    assert not os.path.exists(tmp_path / "data")
