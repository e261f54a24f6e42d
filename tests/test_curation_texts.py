"""Templates, how a critic's answers are read, and the filters."""

import itertools
import json
import shutil
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from curation_cases import HEADINGS, picture, reflection, thought
from data_pipelines.config import from_config_dict
from data_pipelines.curation import filters
from data_pipelines.curation.config import CurateConfig, FilterConfig
from data_pipelines.curation.critics import EndpointCritic
from data_pipelines.curation.filters import (
    Rules,
    Seen,
    check_template,
    load_safety,
)
from data_pipelines.curation.looks import look_at, measure_similarity
from data_pipelines.curation.material import Case, Picture, Rejected
from data_pipelines.curation.opening import describe_config
from data_pipelines.curation.templates import FOLDER, load_templates, read_reflection, read_score, read_thought
from data_pipelines.endpoints import Reply
from data_pipelines.system_prompts import load_system_prompt

CONFIG = FilterConfig()
RULES = Rules(CONFIG, HEADINGS)
# Text that is no part of the form itself.
PLAIN = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=60).filter(
    lambda text: text.strip() and "think>" not in text.lower() and "#" not in text and "*" not in text
    and not any(heading.strip(":").lower() in text.lower() for heading in HEADINGS))


def test_the_shipped_templates():
    templates = load_templates()
    assert templates.headings == HEADINGS
    asked = templates.ask_reflection(prompt="A $5 cat", first_thought="Think {of} it")
    assert "A $5 cat" in asked and "Think {of} it" in asked and all(f"### {one}" in asked for one in HEADINGS)
    assert templates.think.substitute(prompt="x $y").count("x $y") == 1
    assert sorted(templates.digests) == sorted(path.name for path in FOLDER.glob("*.txt"))


def test_the_shipped_system_prompt_is_the_same_as_a_file_of_a_config():
    assert load_system_prompt(f"@{FOLDER / 'system_prompt.txt'}") == load_templates().words.system_prompt


def changed(folder, name, text):
    shutil.copytree(FOLDER, folder / "templates")
    path = folder / "templates" / name
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return folder / "templates"


@pytest.mark.parametrize("name, text, told", [
    ("think.txt", "Think.", r"think.txt: the placeholder \$prompt is missing"),
    ("reflect.txt", "$prompt $improvements $steps", r"reflect.txt: the placeholder \$final is missing"),
    ("quality.txt", "$prompt $imagee", r"quality.txt: the placeholder \$imagee is unknown; use \$prompt"),
    ("how_to_think.txt", "$prompt", r"how_to_think.txt: the placeholder \$prompt is unknown; this file has"),
    ("paint.txt", "$prompt for 5$", "paint.txt: a \\$ begins no placeholder"),
    ("headings.txt", "One\nTwo\n", "headings.txt: 2 headings; write 3"),
    ("headings.txt", "One\nTwo\nOne\n", "headings.txt: 3 headings; write 3 different"),
    ("think.txt", None, "think.txt: the template cannot be read"),
    ("think.txt", " \n", "think.txt: the template is empty"),
    ("thinks.txt", "x", "thinks.txt: no template has this name; did you mean 'think'"),
])
def test_a_wrong_template_is_named(name, text, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        load_templates(changed(tmp_path, name, text))


def test_templates_may_be_changed(tmp_path):
    folder = changed(tmp_path, "system_prompt.txt", "")
    (folder / "headings.txt").write_text("Was fehlt\nWas zu tun ist\nDer ganze Auftrag\n")
    templates = load_templates(folder)
    assert templates.words.system_prompt == "" and templates.headings[0] == "Was fehlt"
    assert "### Der ganze Auftrag" in templates.ask_reflection(prompt="x", first_thought="y")
    assert templates.digests != load_templates().digests
    with pytest.raises(ValueError, match="is no folder; copy"):
        load_templates(tmp_path / "absent")


@given(PLAIN)
def test_thoughts_are_read(text):
    wanted = f"<think>{text.strip()}</think>"
    for answer in (text, f"<think>{text}</think>", f"\n <Think>\n{text}\n</THINK>\n"):
        assert read_thought(answer) == wanted
    for answer in ("", "<think></think>", f"<think>{text}", f"{text}</think>", f"So: <think>{text}</think>",
                   f"<think>{text}</think> There.", f"<think>{text}</think><think>{text}</think>"):
        with pytest.raises(ValueError):
            read_thought(answer)


@given(st.lists(PLAIN, min_size=4, max_size=4),
       st.sampled_from(("### {}", "## {}", "**{}**", "{}", "  #### {}  ")), st.booleans())
def test_reflections_are_read_however_they_are_dressed(parts, dress, has_colon):
    parts = [part.strip() for part in parts]
    names = [heading if has_colon else heading.strip(":") for heading in HEADINGS]
    told = "\n\n".join(f"{dress.format(name)}\n{part}" for name, part in zip(names, parts[1:]))
    canonical = "\n\n".join(f"### {heading}\n{part}" for heading, part in zip(HEADINGS, parts[1:]))
    for answer in (f"<think>{parts[0]}\n\n{told}</think>", f"<think>\n{parts[0]}\n</think>\n\n{told}\n",
                   f"{parts[0]}\n{told}"):
        read = read_reflection(answer, HEADINGS)
        assert read == f"<think>{parts[0]}\n\n{canonical}</think>"
        assert check_template(read, HEADINGS) == "" and read_reflection(read, HEADINGS) == read


def test_a_part_may_have_headings_of_its_own():
    told = reflection("a cat").replace("1. Move", "#### 1. Light\n1. Move")
    told = told.replace("2. Sh", "### 2. Edges\n2. Sh")
    read = read_reflection(told, HEADINGS)
    assert "\n#### 1. Light\n" in read and "\n### 2. Edges\n" in read and RULES.judge_reflection(read) == ""


def mutants(parts):
    """All that is wrong in one way with a reflection of an opening and three headed parts."""
    opening, *headed = parts
    blocks = [f"### {heading}\n{part}" for heading, part in zip(HEADINGS, headed)]
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            yield [opening, *(blocks[i] for i in order)]
    for i in range(3):
        yield [opening, *blocks[:i], *blocks[i + 1:]]
        yield [opening, *blocks[:i], blocks[i], *blocks[i:]]
        yield [opening, *blocks[:i], blocks[i].split("\n")[0], *blocks[i + 1:]]
    yield blocks
    yield [opening, blocks[0], f"</think>{blocks[1]}<think>", blocks[2]]


@given(st.lists(PLAIN, min_size=4, max_size=4))
def test_every_part_must_be_there_once_and_in_order(parts):
    for mutant in mutants([part.strip() for part in parts]):
        text = "<think>" + "\n\n".join(mutant) + "</think>"
        assert check_template(text, HEADINGS) == "template"
        with pytest.raises(ValueError):
            read_reflection(text, HEADINGS)


def test_a_reflection_that_was_cut_off_is_no_whole_one():
    whole = reflection("a cat")
    assert read_reflection(whole, HEADINGS) == whole
    for answer in (whole.removesuffix(" sharp.</think>"), whole.removesuffix("</think>")):
        with pytest.raises(ValueError, match="one pair of think tags"):
            read_reflection(answer, HEADINGS)


def test_a_critic_that_is_always_cut_off_is_a_cause():
    """The endpoint never gives such an answer to be read."""
    endpoint = types.SimpleNamespace(config=types.SimpleNamespace(model="critic"),
                                     ask=lambda messages, parse: Reply(None, ("<think>The",)))
    critic = EndpointCritic(endpoint, load_templates(), RULES, max_side=32)
    with pytest.raises(Rejected) as rejected:
        critic.think(Case("a", "a cat", "CC0-1.0", {}), Picture.drawn(picture("a")))
    assert rejected.value.cause == "thought_unreadable" and "raise max_tokens" in rejected.value.told


@given(st.text())
def test_any_text_is_read_or_refused(text):
    for read in (read_thought, lambda one: read_reflection(one, HEADINGS), read_score):
        try:
            value = read(text)
        except ValueError:
            continue
        assert value or value == 0.0


@pytest.mark.parametrize("answer, score", [
    ("7", 7), (" 8.5 ", 8.5), ("10/10", 10), ("**9**", 9), ("Score: 3", 3), ("0", 0), ("6 / 10.", 6)])
def test_scores_are_read(answer, score):
    assert read_score(answer) == score


@pytest.mark.parametrize("answer", ["", "eleven", "11", "-1", "7 or 8", "nan", "1e1", "9" * 400, "3/5"])
def test_what_is_no_score_is_refused(answer):
    with pytest.raises(ValueError, match="no score"):
        read_score(answer)


@given(st.text(max_size=30), st.integers(0, 20), st.integers(0, 20))
def test_lengths(text, low, high):
    count = len(text.strip())
    cause = filters.check_length(text, "thought", low, high)
    assert (cause == "") == (low <= count <= high)
    assert cause != "thought_too_short" or count < low


@given(st.text(st.characters()))
def test_what_does_not_encode_is_refused(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        assert filters.check_unicode(text) == "not_unicode"
    else:
        assert filters.check_unicode(text) == ""


@pytest.mark.parametrize("said, is_refused", [
    ("Compared with the second image, it is dull.", True), ("The Reference  Image has more light.", True),
    ("Bring it closer to the reference.", True), ("As in image 2, add a cat.", True),
    ("Both images show a cat.", True), ("The better image has it.", True), ("the target\nimage", True),
    ("The other picture is sharper.", True), ("It differs from the ground-truth image.", True),
    ("The image is dull; add a second apple.", False), ("Make it a better image of a cat.", False),
    ("The current image lacks a second cat, to the left of the other one.", False),
    ("Give the image a warmer light, for reference colours are warm.", False),
    ("The first image misses a dog.", False), ("Two pictures hang on the wall.", False),
    ("The image shows a cat.", False),
])
def test_a_reflection_speaks_of_one_image(said, is_refused):
    told = reflection(f"a cat. {said}")
    assert RULES.judge_reflection(told) == ("reflection_mentions_image" if is_refused else "")


@pytest.mark.parametrize("said, is_refused", [
    ("The image shows a cat.", True), ("Like in the provided image, a cat sits.", True),
    ("The colours seen in the picture are warm.", True), ("This photo depicts a cat.", True),
    ("The image will show a cat.", False), ("A framed picture hangs on the wall.", False),
    ("The picture should have a warm light.", False),
])
def test_a_thought_comes_before_any_image(said, is_refused):
    assert RULES.judge_thought(thought(f"a cat. {said}")) == ("thought_mentions_image" if is_refused else "")


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(-1, 20))
def test_near_duplicates_are_those_of_a_plain_loop(prints, near):
    seen, kept = Seen(near), []
    for number, one in enumerate(prints + [value ^ 5 for value in prints]):
        is_near = near >= 0 and any((one ^ other).bit_count() <= near for other in kept)
        assert seen.check_image(str(number), one) == ("near_duplicate_image" if is_near else "")
        if not is_near:
            kept.append(one)
            seen.take_image(str(number), one)


def test_many_images_and_prompts_are_remembered():
    seen = Seen(0)
    for n in range(3000):
        assert seen.check_image(str(n), n) == ""
        seen.take_image(str(n), n)
    assert seen.check_image("17", 9999) == "duplicate_image"
    assert seen.check_image("x", 2999) == "near_duplicate_image"
    assert seen.check_prompt("A cat") == seen.check_prompt("A cat") == ""    # looked at, and not taken
    seen.take_prompt("A cat")
    assert [seen.check_prompt(one) for one in (" a  CAT. ", "a cat?", "a cat!b", '"a cat"')] == [
        "duplicate_prompt", "duplicate_prompt", "", "duplicate_prompt"]


@pytest.mark.parametrize("key", range(20))
def test_fingerprints_outlive_resizing_and_light_and_tell_images_apart(key):
    pixels = picture(str(key), side=96)
    small = np.asarray(Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC))
    darker = (pixels * 0.7).astype(np.uint8)
    fingerprint = lambda image: look_at(image).fingerprint
    one, other = fingerprint(pixels), fingerprint(picture(f"not {key}", side=96))
    assert max((one ^ fingerprint(changed)).bit_count() for changed in (small, darker)) <= CONFIG.near_bits
    assert (one ^ other).bit_count() > 2 * CONFIG.near_bits
    assert 0 <= one < 2**64


def test_similarity_is_one_of_equals_and_falls_with_noise():
    pixels = picture("a", side=80)
    noise = np.random.default_rng(0).normal(0, 1, pixels.shape)
    look = look_at(pixels)
    found = [measure_similarity(look, look_at(np.clip(pixels + strength * noise, 0, 255).astype(np.uint8)))
             for strength in (0, 40, 120, 1000)]
    assert found[0] == 1.0 and found == sorted(found, reverse=True) and found[-1] < 0.5
    assert measure_similarity(look, look_at(picture("a", side=64))) > 0.95    # of any sizes
    bounds = FilterConfig(min_similarity=0.2, max_similarity=0.9)
    others = (pixels, picture("b"), 255 - pixels)
    assert [filters.check_similarity(look, look_at(other), bounds) for other in others] == [
        "too_similar", "too_different", "too_different"]


@pytest.mark.parametrize("fields, told", [
    ({"min_thought_chars": 9000}, "min_thought_chars is 9000, above max_thought_chars"),
    ({"max_reflection_chars": 10**6}, "max_reflection_chars is 1000000; it can be 64536 at most"),
    ({"min_similarity": 0.99}, "min_similarity is 0.99"), ({"min_quality": 11}, "min_quality is 11"),
    ({"forbidden_in_thought": ("(",)}, "no regular expression"),
    ({"max_prompt_chars": 0}, "max_prompt_chars is 0"),
])
def test_filters_that_would_take_nothing_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        FilterConfig(**fields)


@pytest.mark.parametrize("name, told", [("nowhere:check", "nowhere"), ("json:chek", "chek"), ("json", "json"),
                                        ("json:__name__", "of type str"), (":", "package.module:function")])
def test_a_hook_that_is_not_there_is_named(name, told):
    with pytest.raises(ValueError, match=told):
        load_safety(name)
    assert load_safety("") is None


def test_a_hook_that_answers_nonsense_ends_it():
    with pytest.raises(ValueError, match="the safety hook returned True"):
        Rules(CONFIG, HEADINGS, lambda prompt, texts, images: True).judge_safety("a", (), ())


MANNERS = {"url": "https://elsewhere/v1", "key": "KEY", "concurrency": 1, "timeout": 1.0, "attempts": 2,
           "price_in": 1.0, "price_out": 2.0, "price_image": 3.0, "budget": 4.0}


@pytest.mark.parametrize("name", [*MANNERS, "model", "options", "asks"])
def test_how_an_endpoint_is_asked_does_not_decide_the_records(name):
    """Resumed elsewhere, or with another budget, it is the same data set; with another model it is not."""
    others = MANNERS | {"model": "other", "options": {"temperature": 1}, "asks": 1}
    endpoint = {"url": "http://127.0.0.1/v1", "model": "critic", "price_in": 0.5}
    configs = [from_config_dict(CurateConfig, {"prompts": "a", "critic": {"endpoint": fields}})
               for fields in (endpoint, endpoint | {name: others[name]})]
    one, other = map(describe_config, configs)
    assert (one == other) == (name in MANNERS)


def test_a_description_is_what_a_manifest_gives_back():
    endpoint = {"url": "http://127.0.0.1/v1", "model": "critic", "options": {"stop": ("a", "b")}}
    told = describe_config(from_config_dict(CurateConfig, {"prompts": "a", "critic": {"endpoint": endpoint}}))
    assert told == json.loads(json.dumps(told)) and told["critic"]["endpoint"]["options"]["stop"] == ["a", "b"]


def test_moved_inputs_are_the_same_inputs():
    """Their digests are recorded by themselves."""
    critic = {"endpoint": {"url": "http://127.0.0.1/v1", "model": "critic"}}
    base = {"prompts": "a", "critic": critic, "painter": {"kind": "folder", "folder": "b"}}
    moved = {"prompts": "x/a", "painter": {"kind": "folder", "folder": "x/b"}, "templates": "x"}
    one, other = (describe_config(from_config_dict(CurateConfig, fields)) for fields in (base, base | moved))
    assert one == other and json.dumps(one)


@pytest.mark.parametrize("fields, told", [
    ({"critic": {}}, "endpoint is missing, but kind is 'endpoint'"),
    ({"modes": ("initial_ful",)}, "unknown 'initial_ful'"), ({"modes": ()}, "name at least one"),
    ({"suffix": "../x"}, "suffix is '../x'"), ({"painter": {"kind": "shapes"}}, "set both to 'shapes'"),
    ({"painter": {"kind": "folder"}}, "folder is missing"), ({"painter": {"kind": "fodler"}}, "'painter.kind'"),
    ({"sketcher": {"kind": "endpoint"}}, "painter is missing"), ({"painter": {"size": "big"}}, "size is 'big'"),
    ({"critc": {}}, "did you mean 'critic'"),
    ({"estimate": {"chars_per_token": 0}}, "chars_per_token is 0"),
])
def test_settings_are_checked(fields, told):
    critic = {"endpoint": {"url": "http://127.0.0.1/v1", "model": "critic"}}
    with pytest.raises(ValueError, match=told):
        from_config_dict(CurateConfig, {"prompts": "a.txt", "critic": critic, **fields})
