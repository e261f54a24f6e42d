"""A whole curation: whatever the server does and whenever it ends, nothing is lost or counted twice."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from curation_cases import answer, contents, make_config, picture, reflection, write_first_rounds, write_prompts
from data_cases import data_config
from data_pipelines import endpoints
from data_pipelines.check import Wish, check
from data_pipelines.config import DataConfig, GroupConfig, ImageTransform
from data_pipelines.curation.curating import answers_folder, curate, prepare
from data_pipelines.endpoints import BudgetSpent, EndpointError
from data_pipelines.pipeline import make_iterator
from data_pipelines.records import TextPart, parse_conversation
from data_pipelines.sources import ParquetRows
from data_pipelines.tokenizer import train_tokenizer
from endpoint_cases import FAULTS, Misbehaving, images_of, texts_of

ROOT = pathlib.Path(__file__).parents[1]
NUM, NUM_PAIRS, NUM_DRAWN = 12, 4, 11    # prompts, pairs, first rounds
NUM_REQUESTS = NUM + (NUM + NUM_PAIRS) + NUM_DRAWN    # images, thoughts, reflections


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    prompts = write_prompts(folder / "prompts", NUM, num_pairs=NUM_PAIRS)
    return prompts, write_first_rounds(folder / "first", [f"prompt number {i}" for i in range(NUM_DRAWN)])


@pytest.fixture(scope="module")
def curated(inputs, tmp_path_factory):
    """By a well-behaved server."""
    out = tmp_path_factory.mktemp("curated") / "data"
    with Misbehaving(answer).running() as server:
        draft = prepare(make_config(server.url, *inputs), out=out)
        done = curate(draft, out=out)
        assert set(server.answered.values()) == {1}
    return out, draft, done, server


def run(server, inputs, out, **fields):
    return curate(prepare(make_config(server.url, *inputs, **fields), out=out), out=out)


def rows(out, mode):
    return [json.loads(row.text) for row in _read(ParquetRows(out / f"{mode}_learning"))]


def _read(source):
    return [source[i] for i in range(len(source))]


def test_counts_and_manifest(curated):
    out, _, done, server = curated
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == set(contents(out)) - {"manifest.json"}
    assert manifest["counts"] == done.counts == {
        f"{side}_{kind}": count for side, count in (("initial", NUM + NUM_PAIRS), ("improving", NUM_DRAWN))
        for kind in ("thinking_understanding", "thinking_generation", "full")}
    assert done.cases == {"read": NUM + NUM_PAIRS, "whole": NUM + NUM_PAIRS - 1, "partly": 1, "rejected": 0}
    assert manifest["rejections"] == {"no_first_round": {"count": 1, "ids": ["p011"]}}
    assert [json.loads(line)["id"] for line in open(out / "rejected.jsonl")] == ["p011"]
    assert manifest["usage"] == {
        "critic": {"model": "critic", "served": ["served"], "tokens_in": 100 * 27, "tokens_out": 10 * 27,
                   "cost": 2.0 * 27},
        "painter": {"model": "painter", "served": [], "tokens_in": 20 * NUM, "tokens_out": 0,
                    "cost": 3.0 * NUM}}
    assert len(server.answered) == NUM_REQUESTS
    assert sorted(file.name for file in out.parent.iterdir()) == ["data", "data.answers"]


def test_the_estimate_is_what_is_sent(curated):
    _, draft, _, server = curated
    sent = {"better images": 0, "thoughts": 0, "reflections": 0}
    for body in server.bodies.values():
        sent["better images" if "prompt" in body else
             ("", "thoughts", "reflections")[len(images_of(body))]] += 1
    assert {one.what: one.requests for one in draft.expenses} == sent
    length = lambda count: sum(len(texts_of(body).strip()) for body in server.bodies.values()
                               if len(images_of(body)) == count)
    thoughts, reflections = (next(one for one in draft.expenses if one.what == what)
                             for what in ("thoughts", "reflections"))
    assert thoughts.tokens_in == round(length(1) / 4) + sent["thoughts"] * 1300
    first_thoughts = sum(len(f"<think>First, prompt number {n}.</think>") for n in range(NUM_DRAWN))
    texts = (length(2) - first_thoughts) / 4 + 230 * NUM_DRAWN    # a thought is taken to have 230 tokens
    assert reflections.tokens_in == round(texts) + sent["reflections"] * 2 * 1300
    assert thoughts.cost == pytest.approx(thoughts.tokens_in * 1e4 / 1e6 + thoughts.tokens_out * 1e5 / 1e6)


def test_parts_come_from_where_they_should(curated, inputs):
    """One case followed through: its prompt, both images, the base's thought, the critic's texts."""
    out, *_ = curated
    turns = rows(out, "improving_full")[3]
    system, prompt, parts = turns[0], turns[1], turns[2]["content"]
    assert prompt == {"role": "user", "content": "prompt number 3"} and "think" in system["content"]
    assert parts[0] == {"type": "text", "content": "<think>First, prompt number 3.</think>", "need_loss": False}
    assert [part["type"] for part in parts] == ["text", "image", "text", "image"]
    record = parse_conversation(json.dumps(turns), mode="", place="")
    first, better = (part.data for part in record.parts if not isinstance(part, TextPart))
    assert first == (inputs[1] / "0003" / "turn1.png").read_bytes()
    assert better == endpoints.encode(picture("better prompt number 3"))
    assert parts[2]["content"].count("### ") == 3
    pair = parse_conversation(json.dumps(rows(out, "initial_full")[NUM + 1]), mode="", place="")
    assert pair.parts[-1].data == (inputs[0].parent / "images" / "1.png").read_bytes()


def test_the_critic_sees_prompt_plan_and_both_images_in_order(curated):
    *_, server = curated
    asked = [body for body in server.bodies.values() if len(images_of(body)) == 2]
    for body in asked:
        prompt = re.search(r"prompt number \d+", texts_of(body))[0]
        first, better = images_of(body)
        np.testing.assert_array_equal(first, picture(f"first {prompt}"))
        np.testing.assert_array_equal(better, picture(f"better {prompt}"))
        assert f"<think>First, {prompt}.</think>" in texts_of(body)
    assert len(asked) == NUM_DRAWN
    shown = [image for body in server.bodies.values() if len(images_of(body)) == 1 for image in images_of(body)]
    known = [picture(f"better prompt number {n}") for n in range(NUM)] + [
        picture(f"images/{n}.png") for n in range(NUM_PAIRS)]
    assert sorted(image.tobytes() for image in shown) == sorted(image.tobytes() for image in known)


def test_licence_and_provenance(curated):
    source = ParquetRows(curated[0] / "improving_full_learning",
                         dict.fromkeys(("id", "licence", "provenance"), "string"))
    id_, licence, provenance = source[3].values
    known = json.loads(provenance)
    assert (id_, licence) == ("p003", "CC0-1.0")
    assert known["prompt"] == {"file": "prompts.jsonl", "line": 4}
    assert known["first"]["by"] == "irg_jax.generate" and known["first"]["checkpoint"] == {"path": "base"}
    assert (known["image"]["model"], known["texts"]) == ("painter", "critic") and known["image"]["sha256"]
    source = ParquetRows(curated[0] / "initial_full_learning", {"licence": "string", "provenance": "string"})
    licence, provenance = source[NUM].values
    assert licence == "CC-BY-4.0" and json.loads(provenance)["image"]["by"] == "pair"
    assert json.loads(provenance)["prompt"]["source"] == "made up"


def test_check_and_training_take_it(curated):
    out, *_ = curated
    groups = check(out, Wish(DataConfig(source=str(out), groups=(GroupConfig("any"),))), workers=1)
    assert len(groups) == 6 and not any(group.faults for group in groups.values())
    texts = [part.text for group in groups for part in parse_conversation(
        ParquetRows(out / group)[0].text, mode=group, place="").parts if isinstance(part, TextPart)]
    config = data_config(source=str(out), split="", groups=tuple(GroupConfig(group) for group in groups),
                         text_tokens=4096, vit_tokens=128, latent_tokens=128, images=8,
                         vae_transform=ImageTransform(16, 64, 64), vit_transform=ImageTransform(14, 56, 56))
    iterator = make_iterator(config, train_tokenizer(texts, vocab_size=600))
    batches = [next(iterator) for _ in range(3)]
    iterator.close()
    assert all((batch.text_weight.sum(axis=1) > 0).all() for batch in batches)
    assert iterator.counters["bad_records"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_misbehaving_server_changes_no_byte(seed, curated, inputs, tmp_path):
    chance = random.Random(seed)
    quick = [fault for fault in FAULTS if fault not in ("slow", "drip")]
    def faults(key, number):
        if seed == 0 and number == 0 and chance.random() < 0.2:
            return chance.choice(("slow", "drip"))
        return chance.choice(quick) if chance.random() < 0.4 and number < 6 else ""
    with Misbehaving(answer, faults).running() as server:
        done = run(server, inputs, tmp_path / "data", timeout=1.0)    # less than a slow answer takes
    assert contents(tmp_path / "data") == contents(curated[0])
    assert len(server.answered) == NUM_REQUESTS and set(server.answered.values()) == {1}
    assert done.cases == curated[2].cases and sum(server.tries.values()) > NUM_REQUESTS


def test_a_spent_budget_ends_it_and_more_of_it_goes_on(curated, inputs, tmp_path):
    out = tmp_path / "data"
    with Misbehaving(answer).running() as server:
        critic = lambda budget: {"endpoint": {"url": server.url, "model": "critic", "price_in": 1e4,
                                              "price_out": 1e5, "concurrency": 3, "budget": budget}}
        with pytest.raises(BudgetSpent, match="budget 20 is spent"):
            run(server, inputs, out, critic=critic(20.0))
        assert not out.exists() and len(server.answered) < NUM_REQUESTS
        run(server, inputs, out, critic=critic(0.0))
    assert contents(out) == contents(curated[0])
    assert len(server.answered) == NUM_REQUESTS and set(server.answered.values()) == {1}


def test_a_refusal_ends_it_with_a_sentence(inputs, tmp_path):
    with Misbehaving(answer, lambda key, number: "401").running() as server:
        with pytest.raises(EndpointError, match="refuses, status 401"):
            run(server, inputs, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_killed_in_the_middle_the_same_command_goes_on(curated, inputs, tmp_path):
    """SIGKILL at three moments: what is kept is not asked again, and no byte differs."""
    out = tmp_path / "data"
    with Misbehaving(lambda body: time.sleep(0.05) or answer(body)).running() as server:
        config = tmp_path / "config.py"
        config.write_text(_CONFIG.format(url=server.url, prompts=str(inputs[0]), first=str(inputs[1])))
        command = [sys.executable, "-m", "data_pipelines.curate", "--config", str(config), "--out", str(out)]
        told = subprocess.run([*command, "--estimate"], cwd=ROOT, capture_output=True, text=True)
        assert "16 prompts, of which 0" in told.stdout, told.stderr
        assert "in all                 39" in told.stdout
        assert not server.tries and not out.exists()
        kept: set[str] = set()
        for wanted in (2, 12, 25):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(kept) < wanted and process.poll() is None:
                time.sleep(0.005)
                kept = {file.stem for file in answers_folder(out).glob("*/*.json")}
            assert process.poll() is None, "it was over before it was killed"
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not out.exists()
            kept = {file.stem for file in answers_folder(out).glob("*/*.json")}
            before = {key: server.tries[key] for key in server.tries}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "wrote 81 records of 6 modes" in done.stdout, done.stderr
        asked = {key for key in server.tries if server.tries[key] != before.get(key, 0)}
        assert len(kept) >= 25 and len(server.tries) == NUM_REQUESTS
        assert len(asked) <= NUM_REQUESTS - len(kept)     # nothing that was kept
        assert contents(out) == contents(curated[0])
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "already made: 81" in told.stdout and "critic: 54.00 spent so far" in told.stdout


_CONFIG = """
import ml_collections

def get_config():
    endpoint = {{"url": "{url}", "concurrency": 4}}
    return ml_collections.ConfigDict({{
        "prompts": "{prompts}", "licence": "CC0-1.0", "filters": {{"min_side": 16}},
        "rows_per_file": 8, "rows_per_group": 4, "sketcher": {{"kind": "folder", "folder": "{first}"}},
        "critic": {{"endpoint": {{**endpoint, "model": "critic", "price_in": 1e4, "price_out": 1e5}}}},
        "painter": {{"kind": "endpoint", "size": "32x32",
                     "endpoint": {{**endpoint, "model": "painter", "price_image": 3.0}}}}}})
"""


def test_a_link_leads_to_the_data_set_and_answers_are_beside_the_link(inputs, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    with Misbehaving(answer).running() as server:
        assert run(server, inputs, tmp_path / "link", modes=("initial_full",)).written
        assert not run(server, inputs, tmp_path / "link", modes=("initial_full",)).written
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["data"]
    assert (tmp_path / "link.answers").is_dir()


def test_two_at_once_do_not_mix(inputs, tmp_path):
    out = tmp_path / "data"
    def slow(body):
        with pytest.raises(ValueError, match="another build is writing"):
            run(server, inputs, out)
        return answer(body)
    with Misbehaving(slow).running() as server:
        endpoint = {"url": server.url, "model": "critic", "concurrency": 1, "attempts": 1,
                    "price_in": 1e4, "price_out": 1e5}
        run(server, inputs, out, critic={"endpoint": endpoint}, modes=("initial_full",))


def test_every_bad_answer_is_a_cause_and_no_other_case_suffers(inputs, tmp_path):
    """Each case but one gets its own kind of bad text for ever; the rest is as it was."""
    bad = {"number 0": ("thought", "<think>never closed", "thought_unreadable"),
           "number 1": ("thought", "<think>short</think>", "thought_too_short"),
           "number 2": ("thought", f"<think>The image shows {'a cat ' * 20}</think>", "thought_mentions_image"),
           "number 3": ("reflection", "no parts at all", "reflection_unreadable"),
           "number 4": ("reflection", reflection("a cat, as in image 2"), "reflection_mentions_image"),
           "number 5": ("reflection", reflection("\ud800"), "not_unicode"),
           "number 6": ("reflection", reflection("x" * 20_000), "reflection_too_long")}
    def spoilt(body):
        for key, (what, text, _) in bad.items():
            if f"prompt {key}\n" in texts_of(body) and len(images_of(body)) == 1 + (what == "reflection"):
                return text
        return answer(body)
    with Misbehaving(spoilt).running() as server:
        done = run(server, inputs, tmp_path / "data")
    wanted = {cause: 1 for *_, cause in bad.values()} | {"no_first_round": 1}
    assert done.rejections == wanted and done.cases["partly"] == 8
    told = {(one["id"], one["what"], one["cause"])
            for one in map(json.loads, open(tmp_path / "data/rejected.jsonl"))}
    assert told == {(f"p{int(key[-1]):03d}", {"thought": "initial", "reflection": "improving"}[what], cause)
                    for key, (what, _, cause) in bad.items()} | {("p011", "improving", "no_first_round")}
    assert done.counts["initial_full"] == NUM + NUM_PAIRS - 3
    assert done.counts["improving_full"] == NUM_DRAWN - 4
    asked = [body for body in server.bodies.values() if "prompt number 0\n" in texts_of(body) + "\n"]
    assert len(asked) >= 3    # asked again, then left


def test_an_answer_that_will_not_do_is_asked_again_and_paid_for_once(curated, inputs, tmp_path):
    """The first answer to every question is nonsense; interrupted and resumed, none is sent twice."""
    first = lambda body: "prompt" not in body and "seed" not in body
    with Misbehaving(lambda body: "nonsense" if first(body) else answer(body)).running() as server:
        endpoint = lambda budget: {"endpoint": {"url": server.url, "model": "critic", "price_in": 1e4,
                                                "price_out": 1e5, "budget": budget}}
        with pytest.raises(BudgetSpent):
            run(server, inputs, tmp_path / "data", critic=endpoint(40.0))
        done = run(server, inputs, tmp_path / "data", critic=endpoint(0.0))
    assert done.counts == curated[2].counts and set(server.answered.values()) == {1}
    assert len(server.answered) == NUM + 2 * (NUM + NUM_PAIRS + NUM_DRAWN)
    for file, data in contents(tmp_path / "data").items():
        assert file == "manifest.json" or data == contents(curated[0])[file]    # usage alone differs


def test_what_an_endpoint_declines_is_a_rejection(inputs, tmp_path):
    def decline(key, number):
        body = server.bodies[key]
        if len(images_of(body)) == 2 and "prompt number 5\n" in texts_of(body):
            return "declined"
        return "declined" if body.get("prompt") in ("prompt number 2", "prompt number 3") else ""
    server = Misbehaving(answer, decline)
    with server.running():
        done = run(server, inputs, tmp_path / "data")
    assert done.rejections == {"declined": 3, "no_first_round": 1}
    assert done.cases == {"read": NUM + NUM_PAIRS, "whole": NUM + NUM_PAIRS - 4, "partly": 2, "rejected": 2}
    assert done.counts["initial_full"] == NUM + NUM_PAIRS - 2 and done.counts["improving_full"] == NUM_DRAWN - 3


def test_a_painter_that_repeats_itself_is_noticed(inputs, tmp_path):
    same = lambda body: picture("always the same") if "prompt" in body else answer(body)
    with Misbehaving(same).running() as server:
        done = run(server, inputs, tmp_path / "data")
    assert done.rejections == {"duplicate_image": NUM - 1}
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["rejections"]["duplicate_image"]["ids"] == [f"p{number:03d}" for number in range(1, NUM)]
    assert done.cases == {"read": NUM + NUM_PAIRS, "whole": 1 + NUM_PAIRS, "partly": 0, "rejected": NUM - 1}


def test_thresholds_are_kept(inputs, tmp_path):
    first = {f"prompt number {number}": number for number in range(NUM_DRAWN)}
    def paint(body):
        if body.get("prompt") in first and first[body["prompt"]] < 3:
            return picture(f"first {body['prompt']}")    # nothing was improved
        return answer(body)
    with Misbehaving(paint).running() as server:
        done = run(server, inputs, tmp_path / "similar")
        assert done.rejections == {"too_similar": 3, "no_first_round": 1}
        filters = {"min_side": 16, "min_quality": 8.0}
        with pytest.raises(ValueError, match="none of 16 cases was taken: low_quality 16"):
            run(server, inputs, tmp_path / "quality", filters=filters)
        scored = [body for body in server.bodies.values() if "from 0 (useless)" in texts_of(body)]
        assert len(scored) == NUM + NUM_PAIRS
        filters["min_quality"] = 7.0
        assert run(server, inputs, tmp_path / "quality", filters=filters).cases["rejected"] == 0
        with pytest.raises(ValueError, match="small_image"):
            run(server, inputs, tmp_path / "side", filters={"min_side": 33})


def test_nothing_is_asked_of_what_can_be_told_before(tmp_path, inputs):
    """Duplicates, broken and small images cost nothing."""
    folder = tmp_path / "prompts"
    path = write_prompts(folder, 2, num_pairs=3)
    (folder / "images" / "1.png").write_bytes(b"\x89PNG no image")
    (folder / "images" / "2.png").write_bytes((folder / "images" / "0.png").read_bytes())
    with open(path, "a") as file:
        file.write('{"id": "again", "prompt": "  Prompt NUMBER 0. "}\n')
        file.write('{"id": "gone", "prompt": "b", "image": "c.png"}\n{"id": "there", "prompt": "b"}\n')
        file.write('{"id": "out", "prompt": "d", "image": "../../etc/passwd"}\n')
    with Misbehaving(answer).running() as server:
        done = run(server, (path, None), tmp_path / "data")
    assert done.rejections == {"broken_image": 3, "duplicate_image": 1, "duplicate_prompt": 1}
    assert done.cases == {"read": 9, "whole": 4, "partly": 0, "rejected": 5}
    assert len(server.answered) == 3 + 4


def refuse_cats(prompt, texts, images):
    """A hook as a user might write it: it sees the prompt alone first, then all."""
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
    if "number 1" in prompt and not texts:
        return "forbidden word"
    return "forbidden picture" if "number 2" in prompt and len(images) == 2 and len(texts) == 3 else ""


def test_the_safety_hook_has_the_last_word(tmp_path, inputs):
    with Misbehaving(answer).running() as server:
        done = run(server, inputs, tmp_path / "data", safety="test_curation:refuse_cats")
    assert done.rejections["safety: forbidden picture"] == 1
    assert done.rejections["safety: forbidden word"] == 4    # prompts 1, 10 and 11, pair 1
    assert not any("number 10" in texts_of(body) for body in server.bodies.values())
