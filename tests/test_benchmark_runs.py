"""A benchmark drawn, laid out, judged and scored in a folder, with a tiny model and a judge that misbehaves."""

import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from benchmark_cases import MAKE, VERSION
from data_pipelines import endpoints
from data_pipelines.endpoints import Endpoint, EndpointConfig
from endpoint_cases import FAULTS, Misbehaving, images_of, texts_of
from irg_jax.checkpoints.model import save_model
from irg_jax.evaluation.benchmarks import geneval, judging, running
from irg_jax.evaluation.benchmarks.running import BENCHMARKS, Job, find_protocol
from irg_jax.sampling.config import FlowConfig, TextConfig
from sampling_cases import SETTINGS, make_model

QUICK = dataclasses.replace(
    SETTINGS, height=32, width=32, turn1=FlowConfig(num_timesteps=2),
    turn2=FlowConfig(num_timesteps=2, cfg_img_scale=2.0), text=TextConfig(max_length=4))

EVALUATE = [sys.executable, "-m", "irg_jax.evaluate", "--benchmark"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(folder, make_model(0))
    return str(folder)


def make_job(name, folder, count=2, **fields) -> Job:
    """Prompts of our own in the benchmark's form, of words that the tiny tokenizer knows or not."""
    if not (folder / "data").exists():
        MAKE[name](folder / "data")
    protocol = find_protocol(name, VERSION.get(name))
    prompts = protocol.prompts(folder / "data")[:count]
    return Job(protocol, prompts, folder / "out", **{"num_turns": 2, "seed": 42, "limit": count} | fields)


def draw(job, checkpoint, config=QUICK) -> None:
    running.draw(job, config, checkpoint, batch_size=4, mesh=None, described={"command": "c", "versions": {}})
    running.prepare(job)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module", params=BENCHMARKS)
def drawn(request, checkpoint, tmp_path_factory) -> Job:
    job = make_job(request.param, tmp_path_factory.mktemp(request.param))
    draw(job, checkpoint)
    return job


def test_official_files_are_the_drawn_images_of_each_turn(drawn):
    for turn, system in enumerate(drawn.systems, 1):
        for number, prompt in enumerate(drawn.prompts):
            folders = [drawn.out / "samples" / f"{number * drawn.protocol.images + image:04d}"
                       for image in range(drawn.protocol.images)]
            samples = [pixels(folder / f"turn{turn}.png") for folder in folders]
            assert all((folder / f"turn{turn}.txt").is_file() for folder in folders)
            requests = [json.loads((folder / "prompt.json").read_text()) for folder in folders]
            assert [request["seed"] for request in requests] == list(range(42, 42 + len(folders)))
            assert {request["prompt"] for request in requests} == {prompt.text}
            files = [pixels(drawn.official / path) for path in drawn.protocol.paths(prompt, system)]
            if drawn.protocol.name == "oneig":    # one grid, row by row
                (grid,) = files
                files = [grid[y:y + 32, x:x + 32] for y in (0, 32) for x in (0, 32)]
                assert grid.shape == (64, 64, 3)
            for file, sample in zip(files, samples, strict=True):
                if drawn.protocol.name == "genai_bench":
                    assert np.abs(file.astype(int) - sample).mean() < 6    # JPEG
                else:
                    np.testing.assert_array_equal(file, sample)
    if drawn.protocol.images > 1:
        assert not np.array_equal(samples[0], samples[1])


def test_the_manifest_holds_what_makes_it_repeatable(drawn, checkpoint):
    manifest = running.read_manifest(drawn.out)
    assert manifest["complete"] and len(manifest["checkpoint"]["sha256"]) == 64
    assert (manifest["benchmark"], manifest["version"]) == (drawn.protocol.name, drawn.protocol.version)
    assert manifest["seed"] == 42 and manifest["settings"]["turn1"]["num_timesteps"] == 2
    for change in ({"seed": 43}, {"prompts": drawn.prompts[:1]}, {"num_turns": 1}):
        with pytest.raises(ValueError, match=f"another run .its .*{next(iter(change))}"):
            draw(dataclasses.replace(drawn, **change), checkpoint)
    with pytest.raises(ValueError, match="its settings differ"):
        draw(drawn, checkpoint, dataclasses.replace(QUICK, height=48))


def test_what_is_lost_is_drawn_again_and_the_same(drawn, checkpoint, tmp_path):
    lost = drawn.out / "samples" / "0001"
    official = drawn.official / drawn.protocol.paths(drawn.prompts[0], "turn1")[0]
    before = {path: path.read_bytes() for path in [*lost.iterdir(), official]}
    for path in before:
        path.unlink()
    lost.rmdir()
    manifest = running.read_manifest(drawn.out)
    moved = tmp_path / "moved"    # the same weights from another place
    shutil.copytree(checkpoint, moved)
    draw(drawn, str(moved))
    changed = {path.name for path in before if before[path] != path.read_bytes()}
    assert changed == {"prompt.json"}    # it tells where the weights were
    assert running.read_manifest(drawn.out)["checkpoint"] == manifest["checkpoint"]


def test_other_weights_at_the_same_place_are_refused(drawn, tmp_path):
    save_model(tmp_path / "model", make_model(1))
    manifest = running.read_manifest(drawn.out)
    (drawn.out / "manifest.json").write_text(json.dumps(
        manifest | {"checkpoint": manifest["checkpoint"] | {"path": str(tmp_path / "model")}}))
    with pytest.raises(ValueError, match="another run .its sha256 differ"):
        draw(drawn, str(tmp_path / "model"))


def test_missing_images_are_named(drawn):
    path = drawn.official / drawn.protocol.paths(drawn.prompts[-1], "turn2")[0]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(b"")
    name = re.escape(drawn.protocol.paths(drawn.prompts[-1], "turn2")[0])
    with pytest.raises(ValueError, match=f"lacks 1 of .* {name}"):
        running.prepare(drawn)
    path.unlink()
    running.prepare(drawn)
    assert path.read_bytes() == whole


def test_plain_and_self_cot_are_systems_of_their_own(checkpoint, tmp_path):
    plain, thought = (make_job("wise", tmp_path / name, count=1, num_turns=turns)
                      for name, turns in (("plain", 0), ("self_cot", 1)))
    for job, system in ((plain, "plain"), (thought, "self_cot")):
        draw(job, checkpoint)
        assert job.systems == (system,) and (job.official / system / "1.png").is_file()
    assert (plain.out / "samples" / "0000" / "turn1.txt").read_text().strip() == ""
    assert (thought.out / "samples" / "0000" / "turn1.txt").read_text().strip()
    assert not np.array_equal(*(pixels(job.official / job.systems[0] / "1.png") for job in (plain, thought)))


# --- judges ---------------------------------------------------------------------------------------------------
def fake_drawn(name, folder, count, **fields) -> Job:
    """A job whose images are noise, so that no model is needed."""
    job = make_job(name, folder, count, **fields)
    rng = np.random.default_rng(0)
    for number in range(len(job.prompts) * job.protocol.images):
        sample = job.out / "samples" / f"{number:04d}"
        sample.mkdir(parents=True)
        for turn in range(1, len(job.systems) + 1):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(sample / f"turn{turn}.png")
    manifest = job.identity() | {"settings": {}, "checkpoint": {"path": "x", "sha256": "0"}, "complete": True,
                                 "seconds": 1.0}
    (job.out / "manifest.json").write_text(json.dumps(manifest))
    running.prepare(job)
    return job


def marks_of(image) -> dict[str, int]:
    return dict(zip(("Consistency", "Realism", "Aesthetic Quality"), (int(value) % 3 for value in image[0, 0])))


def wise_judge(body) -> str:
    (image,) = images_of(body)
    return "\n".join(f"{name}: {mark}" for name, mark in marks_of(image).items())


def judge_all(job, server, folder=None, prompt=None, **fields) -> Endpoint:
    config = EndpointConfig(server.url, "judge", **{"timeout": 5.0, "options": {"temperature": 0}} | fields)
    endpoint = Endpoint(config, folder or job.out / "answers")
    template = judging.load_template(judging.name_of(job.protocol), prompt)
    for system in job.systems:
        judging.judge(job.protocol, job.prompts, system, official=job.official, results=job.results,
                      endpoint=endpoint, template=template)
    return endpoint


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)


def test_a_misbehaving_judge_gives_the_same_table(tmp_path):
    job = fake_drawn("wise", tmp_path, 40)
    chance = random.Random(1)
    faults = [fault for fault in FAULTS if fault not in ("slow", "drip")]
    pick = lambda key, number: chance.choice(faults) if number < 5 and chance.random() < 0.5 else ""
    with Misbehaving(wise_judge, pick).running() as server:
        endpoint = judge_all(job, server)
        assert set(server.answered.values()) == {1} and len(server.answered) == 80
        texts = [texts_of(body) for body in server.bodies.values()]
        assert "80 requests sent" in judging.note_usage(endpoint, tmp_path / "usage.json")
    assert json.loads((tmp_path / "usage.json").read_text())["tokens_in"] == 8000
    assert sum('PROMPT: "hint 7"\nEXPLANATION: "answer 7"' in text for text in texts) == 2
    table = running.score(job, max_unanswered=0)
    for system in job.systems:
        marks = [marks_of(pixels(job.official / system / f"{prompt.id}.png")) for prompt in job.prompts]
        expected = np.mean([(0.7 * m["Consistency"] + 0.2 * m["Realism"] + 0.1 * m["Aesthetic Quality"]) / 2
                            for m in marks])
        assert table["systems"][system]["overall"]["mean"] == pytest.approx(expected)
        assert table["judges"][system]["model"] == "judge"
    told = running.format_scores(table)
    assert "overall" in told and "turn2 - turn1" in told
    assert "judged by judge with irg_jax's own wording" in told


def test_what_no_answer_was_read_of_is_counted_and_left_out_of_both(tmp_path):
    job = fake_drawn("wise", tmp_path, 30)
    silent = lambda body: "no idea" if "hint 3\"" in texts_of(body) else wise_judge(body)
    decline = lambda key, number: "declined" if "hint 5\"" in texts_of(server.bodies[key]) else ""
    server = Misbehaving(silent, decline)
    with server.running():
        endpoint = judge_all(job, server)
        assert endpoint.usage.unparsed == 6
    with pytest.raises(ValueError, match="no readable answer on 2 of 30 prompts, 3, 5; more than"):
        running.score(job, max_unanswered=0.01)
    table = running.score(job, max_unanswered=0.07)
    assert table["unanswered"] == {"turn1": ["3", "5"], "turn2": ["3", "5"]}
    assert set(table["by_prompt"]["turn2"]) == {prompt.id for prompt in job.prompts} - {"3", "5"}
    assert "told no" in (job.results / "turn1" / "answers.jsonl").read_text()


def test_tiif_is_asked_its_questions_once_a_prompt(tmp_path):
    job = fake_drawn("tiif", tmp_path, 20)
    answer = lambda body: "Yes, it is.\nNo." if images_of(body)[0][0, 0, 0] % 2 else "yes\nyes"
    with Misbehaving(answer).running() as server:
        judge_all(job, server)
        text = texts_of(next(iter(server.bodies.values())))
    assert text.endswith("as there are questions (2).\n\nIs it red?\nIs it round?")
    table = running.score(job, max_unanswered=0)
    right = [1.0 if pixels(job.official / job.protocol.paths(prompt, "turn2")[0])[0, 0, 0] % 2 else 0.5
             for prompt in job.prompts]
    assert list(table["by_prompt"]["turn2"].values()) == right
    record = json.loads((job.results / "turn2" / "shape+color" / "long" / "0.json").read_text())
    assert record["gt_answers"] == ["yes", "no"] and record["desc"] == "long_description"


def test_other_words_for_the_judge_are_taken_and_noted(tmp_path):
    job, path = fake_drawn("wise", tmp_path, 2), tmp_path / "judge.txt"
    path.write_text("Be kind.\n---\nMark $prompt by $explanation. It costs $$5.\n")
    with Misbehaving(wise_judge).running() as server:
        judge_all(job, server, prompt=str(path))
        assert {texts_of(body) for body in server.bodies.values()} == {
            f"Be kind.\nMark hint {n} by answer {n}. It costs $5." for n in (1, 2)}
    noted = json.loads((job.results / "turn1" / "judge.json").read_text())
    assert noted["wording"] == str(path) and noted["system"] == "Be kind."
    assert noted["question"] == "Mark $prompt by $explanation. It costs $$5."
    (job.results / "turn2" / "judge.json").write_text(json.dumps(noted | {"model": "another"}))
    with pytest.raises(ValueError, match="not one judge saw all of turn1, turn2"):
        running.score(job, max_unanswered=0)
    assert noted["wording_sha256"] != judging.load_template("wise_legacy").sha256
    for text in ("no rule $prompt $explanation", "a\n---\n$prompt alone", "a\n---\n$prompt $explanation $other",
                 "a\n---\n$prompt $explanation $", "a\n---\n "):
        path.write_text(text)
        with pytest.raises(ValueError, match="judge.txt: needs the system's words"):
            judging.load_template("wise_legacy", str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        judging.load_template("wise_legacy", "nowhere.txt")


def test_killed_while_judging_it_goes_on_and_pays_nothing_twice(tmp_path):
    job = fake_drawn("wise", tmp_path, 24)
    def slow(body):
        time.sleep(0.1)
        return wise_judge(body)
    command = [*EVALUATE, "wise", "--data", str(tmp_path / "data"), "--out", str(job.out), "--limit", "24",
               "--judge_model", "judge", "--judge_concurrency", "2"]
    # The same prompts as `--limit` spreads them.
    spread = [job.protocol.prompts(tmp_path / "data")[i] for i in np.linspace(0, 999, 24).astype(int)]
    job = dataclasses.replace(job, prompts=spread)
    manifest = json.loads((job.out / "manifest.json").read_text())
    (job.out / "manifest.json").write_text(json.dumps(manifest | job.identity()))
    with Misbehaving(slow).running() as server:
        child = subprocess.Popen([*command, "--judge", server.url], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        while sum(server.answered.values()) < 10 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        answered = sum(server.answered.values())
        kept = len(list((job.out / "answers").glob("*.json")))
        assert answered < 48 and kept >= answered - 2    # two were under way
        again = subprocess.run([*command, "--judge", server.url], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert sum(server.answered.values()) <= 48 + 2 and len(server.answered) == 48
    assert f"{48 - kept} requests sent, {kept} answers kept from before" in again.stdout
    assert "overall" in again.stdout and (job.out / "scores.json").is_file()


# --- GenEval's own detector -----------------------------------------------------------------------------------
def test_genevals_detector_runs_where_its_packages_are(tmp_path):
    job = fake_drawn("geneval", tmp_path, 3)
    script = tmp_path / "geneval" / "evaluation" / "evaluate_images.py"
    script.parent.mkdir(parents=True)
    script.write_text(textwrap.dedent("""
        import argparse, json, pathlib
        parser = argparse.ArgumentParser()
        parser.add_argument("imagedir"); parser.add_argument("--outfile"); parser.add_argument("--model-path")
        flags = parser.parse_args()
        assert flags.model_path == "weights"
        lines = []
        for folder in sorted(pathlib.Path(flags.imagedir).iterdir()):
            metadata = json.loads((folder / "metadata.jsonl").read_text())
            for image in sorted((folder / "samples").iterdir()):
                verdict = {"tag": metadata["tag"], "correct": "0000" in image.name}
                lines.append(json.dumps({"filename": str(image), **verdict}))
        pathlib.Path(flags.outfile).write_text("\\n".join(lines))
    """))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(ValueError, match="lacks GenEval's packages .it ended with status 1"):
        running.check_detector(str(tmp_path / "geneval"), "/bin/false")
    with pytest.raises(ValueError, match="lacks GenEval's packages .*mmdet"):
        running.check_detector(str(tmp_path / "geneval"), str(python))
    for package in ("mmdet", "open_clip", "clip_benchmark", "torch"):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{package}.py").touch()
    assert running.check_detector(str(tmp_path / "geneval"), str(python)) == script
    running.detect(job, script, str(python), "weights")
    assert running.lacking(job) == []
    assert running.score(job, max_unanswered=0)["systems"]["turn2"]["overall"]["mean"] == 0.25
    assert (job.results / "turn1" / geneval.RESULTS).is_file()
    with pytest.raises(ValueError, match="clone of github.com/djghosh13/geneval"):
        running.check_detector(str(tmp_path), str(python))
    (job.results / "turn1" / geneval.RESULTS).unlink()
    with pytest.raises(ValueError, match="ended with status 1 on turn1"):
        running.detect(job, script, str(python), "")


def test_without_results_it_says_how_to_get_them(tmp_path):
    job = fake_drawn("oneig", tmp_path, 2)
    prompts = [job.protocol.prompts(tmp_path / "data")[i] for i in (0, 1119)]
    manifest = json.loads((job.out / "manifest.json").read_text())
    (job.out / "manifest.json").write_text(
        json.dumps(manifest | dataclasses.replace(job, prompts=prompts).identity()))
    pathlib.Path(job.official).rename(tmp_path / "unused")
    told = subprocess.run([*EVALUATE, "oneig", "--data", str(tmp_path / "data"), "--out", str(job.out),
                           "--limit", "2"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "no results yet of turn1, turn2" in told.stdout and "IMAGE_GRID=\"2,2\"" in told.stdout
