"""BAGEL's three kinds of records, read whole or refused in a sentence, and what samples cost."""

import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import FakeTokenizer, data_config, encode_image
from data_pipelines.bagel_records import MAX_FRAMES, parse_editing, parse_text_to_image, parse_vision_language
from data_pipelines.choices import choose
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.lines import Folder
from data_pipelines.packing import assemble
from data_pipelines.records import ImagePart, Limits, TextPart
from data_pipelines.samples import Draws, Kind, ViTImage, measure, realise, unfold

PLACE = "a file row 7"


def picture(height: int = 20, width: int = 20) -> bytes:
    return encode_image(np.full((height, width, 3), 7, np.uint8))


def ask(question: str, answer: str = "a cat", **fields) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def look(line, folder: pathlib.Path, **limits):
    return parse_vision_language(json.dumps(line) if isinstance(line, dict | list) else line, mode="vlm",
                                 place=PLACE, folder=Folder(folder), limits=Limits(**limits))


def outline(record) -> list:
    """Texts as themselves, images as their flags."""
    return [(part.text, part.need_loss) if isinstance(part, TextPart) else part[1:4] for part in record.parts]


# ---- records ----------------------------------------------------------------------------------

def test_text_to_image_has_all_captions_and_an_image_to_learn():
    captions = '{"short": "a cat", "long": "a black cat"}'
    record = parse_text_to_image(b"pixels", captions, mode="t2i", place=PLACE)
    assert record.parts == (TextPart("a cat", False, f"{PLACE}, caption 'short'"),
                            TextPart("a black cat", False, f"{PLACE}, caption 'long'"),
                            ImagePart(b"pixels", True, False, False, f"{PLACE}, image"))
    assert (record.mode, record.place) == ("t2i", PLACE)


def test_editing_has_every_instruction_and_every_use_of_an_image():
    record = parse_editing([b"0", b"1", b"2"], [["red", "in red"], ["blue"]], mode="edit", place=PLACE)
    assert outline(record) == [(False, True, True), ("red", False), ("in red", False), (True, True, True),
                               ("blue", False), (True, False, False)]
    assert [part.place for part in record.parts[1:4]] == [
        f"{PLACE}, instruction 0, alternative 0", f"{PLACE}, instruction 0, alternative 1", f"{PLACE}, image 1"]
    assert [kind for kind, _ in unfold(record)] == [
        Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.TEXT, Kind.NOISED, Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.NOISED]


@pytest.mark.parametrize("question, texts", [
    ("<image>what?", [(0,), "what?"]), ("what?\n<image>\n", ["what?", (0,)]), ("<image>", [(0,)]),
    ("<image> one <image>  two ", [(0,), "one", (1,), "two"])])
def test_vision_language_puts_images_where_their_placeholders_are(tmp_path, question, texts):
    names = [f"{i}.png" for i in range(question.count("<image>"))]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([i]))
    record = look(ask(question, image=names if len(names) > 1 else names[0]), tmp_path)
    found = [part.text if isinstance(part, TextPart) else (part.data[0],) for part in record.parts]
    assert found == [*texts, "a cat"]
    assert [part.need_loss for part in record.parts] == [False] * len(texts) + [True]
    assert all(part[1:4] == (False, False, True) for part in record.parts if isinstance(part, ImagePart))
    assert len({part.place for part in record.parts}) == len(record.parts)


def test_vision_language_without_images_keeps_texts_as_they_are(tmp_path):
    record = look(ask(" why? ", "as <image> says "), tmp_path)
    assert outline(record) == [(" why? ", False), ("as <image> says ", True)]


def test_video_frames_are_images_in_order_and_evenly_spaced(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(30):
        (folder / f"frame_{i}.jpg").write_bytes(bytes([i + 1]))
    (folder / "notes.txt").write_text("no frame")
    line = ask("see <video> what?", video="clip/")
    frames = [part.data[0] - 1 for part in look(line, tmp_path).parts if isinstance(part, ImagePart)]
    assert len(frames) == MAX_FRAMES and frames == [round(i * 29 / 11) for i in range(12)]
    listed = look(line | {"video": ["clip/frame_9.jpg", "clip/frame_2.jpg"]}, tmp_path)
    assert [getattr(part, "data", None) for part in listed.parts] == [None, bytes([10]), bytes([3]), None, None]


CAPTIONS = '{"a": "a cat"}'


@pytest.mark.parametrize("image, captions, message", [
    (None, CAPTIONS, "image: an image must be bytes, not NoneType"),
    (b"", CAPTIONS, "image: the image is empty"),
    (b"p" * 91, CAPTIONS, "image: encoded image of 91 bytes is over max_image_bytes 90"),
    (b"p", None, "captions: they must be a JSON string, not null"),
    (b"p", "a cat", "captions: the value is not JSON"), (b"p", "[" * 10**5, "captions: the value is not JSON"),
    (b"p", '["a cat"]', "JSON object of at least one caption"), (b"p", "{}", "object of at least one caption"),
    (b"p", '{"a": " "}', "caption 'a': the text is empty"), (b"p", '{"a": 7}', "caption 'a': .* not int"),
    (b"p", '{"a": null}', "caption 'a': a text's content must be a string"),
    (b"p", '{"a": "\\ud800"}', "caption 'a': the text is not Unicode"),
    (b"p", '{"a": "%s"}' % ("x" * 31), "caption 'a': text of 31 characters is over max_text_chars 30")])
def test_faults_of_text_to_image_are_named(image, captions, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_text_to_image(image, captions, mode="", place=PLACE, limits=Limits("error", 30, 90))
    assert str(error.value).startswith(PLACE)


@pytest.mark.parametrize("images, instructions, message", [
    (None, [["a"]], "image_list: .* at least two images, not null"),
    ([b"p"], [], "image_list: .* not 1 image"),
    ([b"p", b"p"], None, "instruction_list: 2 images need 1 lists of instructions, not null"),
    ([b"p", b"p"], [["a"], ["b"]], "instruction_list: .* not 2 list"),
    ([b"p", b"p"], [None], "instruction 0: .* at least one instruction, not null"),
    ([b"p", b"p"], [[]], "instruction 0: .* not 0 text"), ([b"p", b"p"], ["a"], "instruction 0: .* not str"),
    ([b"p", b"p"], [["a", ""]], "instruction 0, alternative 1: the text is empty"),
    ([b"p", b"p"], [["a", None]], "instruction 0, alternative 1: .* not NoneType"),
    ([b"p", None], [["a"]], "image 1: an image must be bytes"),
    ([b"p" * 91, b"p"], [["a"]], "image 0: encoded image of 91 bytes is over")])
def test_faults_of_editing_are_named(images, instructions, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_editing(images, instructions, mode="", place=PLACE, limits=Limits("error", 30, 90))
    assert str(error.value).startswith(PLACE)


@pytest.mark.parametrize("line, message", [
    ("{", "the line is not JSON"), (b"\xff{}", "the line is not JSON"), ([], "must be a JSON object, not list"),
    ({}, "conversations must be a list"), ({"conversations": []}, "at least one turn"),
    ({"conversations": ["hi"]}, "turn 0: a turn must be an object with from and value"),
    ({"conversations": [{"from": "system", "value": "hi"}]}, "turn 0: unknown role 'system'"),
    (ask(""), "turn 0: the text is empty"), (ask("why?", " "), "turn 1: the text is empty"),
    (ask("why?", None), "turn 1: .* not NoneType"), (ask("w" * 31), "over max_text_chars 30"),
    ({"conversations": [{"from": "human", "value": "hi"}]}, "no turn is from gpt"),
    (ask("<image>"), "0 <image> must stand in the human turns, not 1 <image> and 0 <video>"),
    (ask("why?", image="a.png"), "1 <image> must stand in the human turns, not 0 <image> and"),
    (ask("<image><video>", image="a.png"), "not 1 <image> and 1 <video>"),
    (ask("<video>", image="a.png"), "1 <image> must stand .* not 0 <image> and 1 <video>"),
    (ask("<image>", image=7), "image: expected a path or a list of paths, not int"),
    (ask("<image>", image=[None]), "image 0 .*: a path must be a string"),
    (ask("<image>", image=[""]), "image 0 .*: a path must be a string that is not empty"),
    (ask("<image>", image="b.png"), "image 0 .'b.png'.: not a readable file"),
    (ask("<image>", image="a\0.png"), "image 0 .*: not a readable file"),
    (ask("<image>", image="x" * 999), "image 0 .*: not a readable file"),
    (ask("<image>", image="\ud800"), "image 0 .*: not a readable file"),
    (ask("<image>", image="clip"), "image 0 .'clip'.: not a readable image but a folder"),
    (ask("<image>", image="empty.png"), "image 0 .*: the image is empty"),
    (ask("<image>", image="large.png"), "encoded image of 91 bytes is over max_image_bytes 90"),
    (ask("<image>", image="/etc/hostname"), "the path must lie inside .* neither absolute nor with '..'"),
    (ask("<image>", image="clip/../../secret.png"), "the path must lie inside"),
    (ask("<image>", image="link.png"), "the path is a link that leads out of"),
    (ask("<image>", image=["a.png"] * 65), "65 images; a line may have 64"),
    (ask("<video>", video=[]), "frame: expected a path or a list of paths"),
    (ask("<video>", video="clip"), "video .'clip'.: the folder holds no frame"),
    (ask("<video>", video="a.mp4"), "video .'a.mp4'.: videos are not decoded here; extract the frames"),
    (ask("<video>", video="../clip"), "video .*: the path must lie inside"),
    (ask("why?", video=["a.png"]), "1 <video> must stand in the human turns"),
    (ask("<video>", video=["a.png"], image="a.png"), "image and video in one line")])
def test_faults_of_vision_language_are_named(tmp_path, line, message):
    folder = tmp_path / "images"
    (folder / "clip").mkdir(parents=True)
    for name, size in (("a.png", 9), ("a.mp4", 9), ("empty.png", 0), ("large.png", 91), ("../secret.png", 9)):
        (folder / name).write_bytes(b"p" * size)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=message) as error:
        look(line, folder, max_text_chars=30, max_image_bytes=90)
    assert str(error.value).startswith(PLACE)


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not a readable image but a folder or device"):
        look(ask("<image>", image="a.png"), tmp_path)


def test_roles_to_be_ignored(tmp_path):
    line = ask("why?")
    line["conversations"].insert(0, {"from": "system", "value": "be brief"})
    assert outline(look(line, tmp_path, unknown_role="ignore")) == [("why?", False), ("a cat", True)]


# ---- costs ------------------------------------------------------------------------------------

SIDES = st.tuples(st.integers(8, 70), st.integers(8, 70))
TEXTS = st.lists(st.text("ab ", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=3)


@st.composite
def records(draw, folder: pathlib.Path):
    """(kind, record) of random texts and image sizes."""
    kind = draw(st.sampled_from(["text_to_image", "editing", "vision_language"]))
    if kind == "text_to_image":
        captions = {str(i): text for i, text in enumerate(draw(TEXTS))}
        return kind, parse_text_to_image(picture(*draw(SIDES)), json.dumps(captions), mode="", place=PLACE)
    pictures = [picture(*draw(SIDES)) for _ in range(draw(st.integers(2, 5)))]
    if kind == "editing":
        return kind, parse_editing(pictures, [draw(TEXTS) for _ in pictures[1:]], mode="", place=PLACE)
    names = [f"{i}.png" for i in range(len(pictures))]
    for name, data in zip(names, pictures):
        (folder / name).write_bytes(data)
    question = "<image>".join([*draw(TEXTS), *[""] * len(names)][:len(names) + 1])
    return kind, look(ask(question, image=names), folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), dropout=st.sampled_from([0.0, 0.5]))
def test_planned_costs_are_what_the_sample_takes(tmp_path_factory, data, seed, dropout):
    """From headers and a choice among kinds, compared with the streams that the assembled pack fills."""
    kind, record = data.draw(records(tmp_path_factory.mktemp("images")))
    group = GroupConfig("a", kind=kind, vit_transform=ImageTransform(14, 56, 28, max_pixels=6000))
    config = data_config(text_tokens=400, vit_tokens=100, latent_tokens=200, images=12)
    items = measure(record, config, FakeTokenizer(), group=group)
    uniform = np.random.default_rng(seed).random((3, len(items)))
    chosen = choose(kind, items[:, 0], uniform[0])
    draws = Draws(chosen, uniform[1, chosen] >= dropout, uniform[2, chosen].astype(np.float32))
    sample = realise(record, draws, config, FakeTokenizer(), group=group)
    pack = assemble([sample], config=config, tokenizer=FakeTokenizer())
    used = [np.count_nonzero(stream.last >= 0) for stream in (pack.text_rows, pack.vit_rows, pack.latent_rows)]
    used.append(np.count_nonzero(pack.image_height))
    assert items[draws.chosen[draws.keep], 1:].sum(axis=0).tolist() == used


def test_images_of_a_vision_language_record_share_their_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(280, 280))
    transform = ImageTransform(14, 980, 28, max_pixels=280 * 280)
    group = GroupConfig("vlm", kind="vision_language", vit_transform=transform)
    config = data_config(vit_tokens=2000, vit_max_side=70)
    for count, side in ((1, 280), (2, 140)):  # the ratio of areas scales the sides, see `target_size`
        record = look(ask("<image>" * count, image=["a.png"] * count), tmp_path)
        items = measure(record, config, FakeTokenizer(), group=group)
        assert items[items[:, 0] == Kind.VIT, 2].tolist() == [(side // 14)**2] * count
        everything = np.arange(len(items))
        draws = Draws(everything, everything >= 0, np.zeros(len(items), np.float32))
        sample = realise(record, draws, config, FakeTokenizer(), group=group)
        assert {item.image.shape for item in sample if isinstance(item, ViTImage)} == {(side, side, 3)}
