"""The two commands that draw: what they write, what they resume, what they refuse."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shapes.records import heldout_prompts
from irg_jax import evaluate as evaluation
from irg_jax.checkpoints.model import save_model
from irg_jax.evaluation import folders as generation
from irg_jax.evaluation.folders import Order
from irg_jax.evaluation.recording import Recorder
from irg_jax.evaluation.results import SYSTEMS, read_manifest, read_results
from irg_jax.evaluation.shapes import digest_prompts, read_prompts
from irg_jax.evaluation.statistics import score_table
from irg_jax.sampling.config import FlowConfig, TextConfig
from irg_jax.sampling.opening import load_generator
from irg_jax.sampling.trajectory import Given
from sampling_cases import SETTINGS, make_model

QUICK = dataclasses.replace(
    SETTINGS, height=32, width=32, turn1=FlowConfig(num_timesteps=2),
    turn2=FlowConfig(num_timesteps=2, cfg_img_scale=2.0), text=TextConfig(max_length=4))
PROMPTS = ["a red circle", "two stars", "a blue ring"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(evaluation.list_models(2)):
        save_model(folder / name, make_model(seed))
    return {name: str(folder / name) for name in evaluation.list_models(2)}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return load_generator(checkpoints["trained"], QUICK, prompts={})


def draw(loaded, out, prompts=PROMPTS, **fields) -> int:
    generator, checkpoint = loaded
    fields = {"seed": 3, "num_turns": 2, "batch_size": 2} | fields
    orders = [prompt if isinstance(prompt, Order) else Order(prompt) for prompt in prompts]
    return generation.generate(orders, generator=generator, checkpoint=checkpoint, out=out, **fields).drawn


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def watch_batches(module, monkeypatch) -> list[tuple[str, ...]]:
    """The prompts of each batch that is drawn from now on."""
    batches, draw = [], module.trajectories
    monkeypatch.setattr(module, "trajectories", lambda generator, prompts, **fields: (
        batches.append(tuple(prompts)), draw(generator, prompts, **fields))[1])
    return batches


def test_every_prompt_gets_its_texts_images_and_one_picture(loaded, tmp_path, monkeypatch):
    batches = watch_batches(generation, monkeypatch)
    assert draw(loaded, tmp_path / "out") == 3
    names = {"turn1.txt", "turn1.png", "turn2.txt", "turn2.png", "trajectory.png", "prompt.json"}
    written = files(tmp_path / "out")
    assert set(written) == {f"{i:04d}/{name}" for i in range(3) for name in names}
    for i, prompt in enumerate(PROMPTS):
        folder = tmp_path / "out" / f"{i:04d}"
        request = json.loads((folder / "prompt.json").read_text())
        assert (request["prompt"], request["seed"]) == (prompt, 3)
        assert Image.open(folder / "turn2.png").size == (32, 32)
        assert Image.open(folder / "trajectory.png").width > 256
    assert written["0000/turn1.png"] != written["0000/turn2.png"] != written["0001/turn2.png"]

    # What is there stays, what is missing is drawn as it would have been: in the same company.
    generation.shutil.rmtree(tmp_path / "out" / "0001")
    assert draw(loaded, tmp_path / "out") == 1 and draw(loaded, tmp_path / "out") == 0
    assert files(tmp_path / "out") == written
    assert batches == [tuple(PROMPTS[:2]), (PROMPTS[2],) * 2, tuple(PROMPTS[:2])]


def test_an_interrupted_prompt_leaves_no_folder(loaded, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(generation, "compose_trajectory", fail)
    with pytest.raises(KeyboardInterrupt):
        draw(loaded, tmp_path / "out")
    assert not (tmp_path / "out" / "0000").exists()
    monkeypatch.undo()
    assert draw(loaded, tmp_path / "out") == 3
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("change", [{"seed": 4}, {"num_turns": 1}, {"prompts": ["other", "one"]},
                                    {"texts": [Order(PROMPTS[0], given=Given(("a",))), PROMPTS[1]]}])
def test_another_run_is_not_mixed_into_a_folder(loaded, tmp_path, change):
    draw(loaded, tmp_path / "out", PROMPTS[:2])
    before = files(tmp_path / "out")
    name, = change
    if name == "texts":
        change = {"prompts": change["texts"]}
    name = {"prompts": "prompt"}.get(name, name)
    with pytest.raises(ValueError, match=f"0000.*{name}.*another --out"):
        draw(loaded, tmp_path / "out", **{"prompts": PROMPTS[:2], **change})
    assert files(tmp_path / "out") == before


def test_control_tokens_and_bad_prompt_files_are_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"prompt 2 contains the control token '<\|im_end\|>'"):
        load_generator(checkpoints["base"], QUICK,
                                  prompts={"prompt 1": "fine", "prompt 2": "red <|im_end|>"})
    path = tmp_path / "prompts.jsonl"
    for content, message in (("", "holds no prompt"), ('{"prompt": 3}', "line 1.*'prompt'"),
                             ('{"prompt": "a"}\n\n{', "line 3.*JSON"), ("[]", "line 1"),
                             ('{"prompt": "a", "seed": -1}', "line 1.*'seed' is -1"),
                             ('{"prompt": "a", "seed": true}', "line 1.*'seed' is True"),
                             ('{"prompt": "a", "texts": ["b", 2]}', "line 1.*'texts' is"),
                             ('{"prompt": "a", "image": 3}', "line 1.*'image' is 3"),
                             ('{"prompt": "a", "image": "none.png"}', "none.png.*cannot be read"),
                             ('{"prompt": "a", "image": "prompts.jsonl"}', "prompts.jsonl"),
                             ('{"prompt": "a \\ud800"}', "line 1.*JSON"), ("[" * 100_000, "line 1.*JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            generation.read_orders(path)
    path.write_text('{"prompt": "a\u2028b", "id": 1}\r\n\n{"prompt": "b", "seed": 7}\n')
    assert generation.read_orders(path) == [Order("a\u2028b"), Order("b", 7)]
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffa red\x0ccircle\n\n two \n")    # as editors on Windows begin a file
    assert generation.read_orders(text) == [Order("a red\x0ccircle"), Order("two")]
    with pytest.raises(ValueError, match="nowhere.txt"):
        generation.read_orders("nowhere.txt")


def test_a_line_may_bring_texts_a_picture_and_a_seed(loaded, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    (tmp_path / "orders.jsonl").write_text(json.dumps(
        {"prompt": "a red circle", "seed": 9, "texts": [None, "draw it in blue"], "image": "mine.png"}))
    (order,) = generation.read_orders(tmp_path / "orders.jsonl")
    assert draw(loaded, tmp_path / "out", [order]) == 1 and draw(loaded, tmp_path / "out", [order]) == 0
    generator, _ = loaded
    state = generator.begin(["a red circle"], seeds=[9])
    (first,), state = generator.think(state)
    _, state = generator.think(generator.look(state, [picture]), ["draw it in blue"])
    folder = tmp_path / "out" / "0000"
    assert (folder / "turn1.txt").read_text() == first + "\n"
    assert (folder / "turn2.txt").read_text() == "draw it in blue\n"
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "turn1.png")), picture)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "turn2.png")), generator.draw(state)[0])
    # Prompts whose pictures have other sizes do not share a batch.
    orders = [order._replace(given=Given(("a",))), order, Order("two stars")]
    assert draw(loaded, tmp_path / "more", orders, batch_size=3) == 3
    assert (tmp_path / "more" / "0001" / "turn2.png").read_bytes() == (folder / "turn2.png").read_bytes()
    with pytest.raises(ValueError, match="prompt 1 brings 2 texts for 1 turns"):
        draw(loaded, tmp_path / "few", [order], num_turns=1)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True,
                          text=True, env={**os.environ, "XLA_FLAGS": ""}, timeout=120)


def test_the_commands_tell_mistakes_in_one_sentence(checkpoints, tmp_path):
    config = ["--config", "configs/shapes_generate.py:quick"]
    result = run("irg_jax.generate", *config, "--checkpoint", checkpoints["trained"],
                 "--out", str(tmp_path / "out"), "--prompt", "a <|im_start|>")
    assert result.returncode == 1 and "vit_transform" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: prompt 1 contains")
    result = run("irg_jax.generate", "--config", "configs/shapes_generate.py", "--prompt", "a",
                 "--config.text.temprature=1", "--checkpoint", "x", "--out", "y")
    assert result.returncode == 1 and "temperature" in result.stderr
    result = run("irg_jax.evaluate", *config, "--base", "x", "--checkpoint", "y", "--out",
                 str(tmp_path / "eval"), "--prompts", "nowhere.jsonl")
    assert result.returncode == 1 and "nowhere.jsonl" in result.stderr
    assert "Traceback" not in result.stderr and not any(tmp_path.iterdir())


# ---- evaluation ---------------------------------------------------------------------------------

@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in heldout_prompts(5)))
    return read_prompts(path, limit=3)


def open_recorder(out, prompts, **fields) -> Recorder:
    return Recorder(out, {"seed": 0, "prompts": digest_prompts(prompts), **fields})


def evaluate(out, prompts, checkpoints) -> Recorder:
    recorder = open_recorder(out, prompts)
    evaluation.evaluate(prompts, config=QUICK, checkpoints=checkpoints, recorder=recorder, seed=0,
                        batch_size=2)
    recorder.finish(prompts=len(prompts), seed=0, versions={}, settings={}, command="evaluate")
    return recorder


def results(out) -> dict:
    return {(result.id, result.system): result for result in read_results(out / "results.jsonl")}


def test_an_evaluation_is_what_the_report_reads(prompts, checkpoints, tmp_path):
    out = tmp_path / "eval"
    evaluate(out, prompts, checkpoints)
    manifest, found = read_manifest(out / "manifest.json"), results(out)
    assert manifest.prompts == 3 and manifest.seconds > 0 and manifest.peak_rss_gib > 0.1
    assert set(manifest.checkpoints) == set(evaluation.list_models(2))
    assert set(found) == {(prompt.id, system) for prompt in prompts for system in SYSTEMS}
    for (_, system), result in found.items():
        image = np.asarray(Image.open(result.image))
        assert image.shape == (32, 32, 3)
        assert result.correct == (not result.reasons)
        assert bool(result.text) <= (system != "base")


@pytest.mark.slow
def test_an_evaluation_of_more_turns_begins_like_one_of_two(prompts, checkpoints, tmp_path):
    evaluate(tmp_path / "two", prompts, checkpoints)
    recorder = open_recorder(tmp_path / "three", prompts, turns=3)
    evaluation.evaluate(prompts, config=QUICK, checkpoints=checkpoints, recorder=recorder, seed=0, batch_size=2,
                        num_turns=3)
    two, three = results(tmp_path / "two"), results(tmp_path / "three")
    assert {system for _, system in three} == {*SYSTEMS, "turn3"}
    for key, result in two.items():
        assert result.image.read_bytes() == three[key].image.read_bytes()
    assert list(score_table(three.values())) == [*SYSTEMS, "turn3"]
    with pytest.raises(ValueError, match="turns differ"):
        open_recorder(tmp_path / "two", prompts, turns=3)


def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(prompts, checkpoints, tmp_path,
                                                              monkeypatch):
    batches, calls = watch_batches(evaluation, monkeypatch), []
    evaluate(tmp_path / "whole", prompts, checkpoints)
    uninterrupted = set(batches)
    make_result = evaluation.make_result

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:    # between two prompts of a batch
            raise KeyboardInterrupt
        return make_result(*args, **kwargs)
    monkeypatch.setattr(evaluation, "make_result", interrupt)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, prompts, checkpoints)
    assert not (out / "manifest.json").exists()
    with (out / "results.jsonl").open("a") as lines:
        lines.write('{"id": "0000')  # as a kill may leave it
    evaluate(out, prompts, checkpoints)
    assert set(batches) == uninterrupted
    whole, cut = results(tmp_path / "whole"), results(out)
    assert set(whole) == set(cut)
    for key, result in whole.items():
        assert dataclasses.replace(result, image=cut[key].image) == cut[key]
        assert result.image.read_bytes() == cut[key].image.read_bytes()


def test_another_evaluation_is_not_mixed_into_a_folder(prompts, checkpoints, tmp_path):
    out = tmp_path / "eval"
    out.mkdir()
    (out / ".progress.json.partial").write_text("{")    # a kill while the first file was written
    open_recorder(out, prompts)    # and one before the first batch has ended
    open_recorder(out, prompts).identify("base", {"path": "a", "sha256": "1"})    # and once more
    open_recorder(out, prompts).identify("base", {"path": "moved", "sha256": "1"})
    with pytest.raises(ValueError, match="eval.*base differ"):
        open_recorder(out, prompts).identify("base", {"path": "a", "sha256": "2"})
    with pytest.raises(ValueError, match="prompts differ"):
        open_recorder(out, prompts[:2])
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        open_recorder(tmp_path / "else", prompts)


@pytest.mark.parametrize("file, text", [
    ("progress.json", "[]"), ("progress.json", '{"identity": 3}'), ("results.jsonl", "[1]\n"),
    ("results.jsonl", '{"id": "0"}\n'), ("results.jsonl", "none\n")])
def test_files_of_something_else_are_told(file, text, prompts, tmp_path):
    open_recorder(tmp_path / "eval", prompts).save()
    (tmp_path / "eval" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*remove the folder and evaluate again"):
        open_recorder(tmp_path / "eval", prompts)


def test_bad_heldout_prompts_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    good = heldout_prompts(2)
    for change, message in (({"id": "../up"}, "line 2.*'id'"), ({"prompt": ""}, "line 2.*'prompt'"),
                            ({"category": "other"}, "line 2.*'category'"),
                            ({"id": "00000"}, "twice"),
                            ({"extra": 1}, "line 2.*fields"),
                            ({"prompt": "a \ud800"}, "line 2.*JSON"),
                            ({"request": {"category": "colors", "groups": []}}, "line 2.*groups")):
        path.write_text(json.dumps(good[0]) + "\n" + json.dumps(good[1] | change) + "\n")
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
