"""`evaluate compare`: runs of any benchmark beside each other, and whatever else a folder may hold."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import endpoints
from endpoint_cases import Misbehaving, images_of, texts_of
from irg_jax.evaluation import comparing
from irg_jax.evaluation.entries import read_entry

MODEL = {"path": "x", "sha256": "0"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)


def make_run(folder, *, seed=0, gain=0.1, count=8, **fields):
    """A scored run of WISE: turn 2 is `gain` above turn 1 on prompt 3 alone."""
    rng, shares = np.random.default_rng(seed), {}
    for turn, system in enumerate(("turn1", "turn2"), 1):
        shares[system] = {str(i + 1): 0.5 + gain * (i == 3) * (turn - 1) for i in range(count)}
        for number in range(count):
            path = folder / "samples" / f"{number:04d}" / f"turn{turn}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (700, 400, 3), dtype=np.uint8)).save(path)
    score = lambda mean: {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}
    table = {"benchmark": "wise", "version": "legacy", "formula": "weighted", "prompts": count, "seed": 42,
             "images_per_prompt": 1, "judges": {"turn1": {"model": "gpt", "wording": "our words"}},
             "systems": {system: {"cultural": score(0.4), "overall": score(np.mean(list(values.values())))}
                         for system, values in shares.items()},
             "difference": {"cultural": score(0.0), "overall": score(gain / count)},
             "by_prompt": shares, "texts": {str(i + 1): f"prompt <{i + 1}>" for i in range(count)}, **fields}
    (folder / "scores.json").write_text(json.dumps(table))
    return folder


def make_shapes(folder):
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(4):
        for system in ("base", "self_cot", "turn1", "turn2"):
            file = f"images/{number}_{system}.png"
            Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(folder / file)
            lines.append(json.dumps({"id": str(number), "category": "counting" if number % 2 else "single",
                                     "prompt": f"shape {number}", "system": system, "image": file,
                                     "correct": system == "turn2", "reasons": [], "seen": [],
                                     "text": ""}) + "\n")
    (folder / "results.jsonl").write_text("".join(lines))
    (folder / "manifest.json").write_text(json.dumps({
        "prompts": 4, "seed": 0, "checkpoints": {}, "settings": {}, "versions": {}, "command": "c",
        "seconds": 1.0, "peak_rss_gib": 1.0}))
    return folder


def test_tables_and_page_show_both_runs_and_what_was_published(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", gain=0.1), make_run(tmp_path / "b", seed=1, gain=0.4)]
    assert comparing.main([*map(str, runs), str(make_shapes(tmp_path / "c")), "--out", str(tmp_path / "out"),
                           "--gallery", "3"]) == 0
    told = (tmp_path / "out" / "compare.md").read_text()
    assert told in capsys.readouterr().out
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in told.splitlines() if line.startswith("|")}
    assert rows["IRG (published)"][:2] == ["0.770", "0.780"]    # overall comes first, in any case
    assert rows["a, turn2"][:2] == ["0.512 [0.412, 0.612]", "0.400 [0.300, 0.500]"]
    assert rows["b, turn2 - turn1"][0] == "+0.050 [-0.050, +0.150]"
    assert rows["c, turn2"][0].startswith("1.000") and rows["c, base"][0].startswith("0.000")
    assert "judge gpt by our words" in told

    page = (tmp_path / "out" / "compare.html").read_text()
    assert "prompt &lt;4&gt;" in page and "<script" not in page and "prompt <4>" not in page
    wise, shapes = page.split("<h2>shapes")
    first = re.search(r'<h4 class="prompt">(.*?)</h4>', wise)[1]
    assert first == "prompt &lt;4&gt;" and wise.count("<article>") == 3    # where they differ most
    pictures = [Image.open(io.BytesIO(base64.b64decode(data)))
                for data in re.findall(r"data:image/png;base64,([\w+/=]+)", wise)]
    assert len(pictures) == 6 and {picture.size for picture in pictures} == {(183, 320)}
    assert "base</small>" in shapes and "turn2</small>" in shapes    # of one run its first and last
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [section["benchmark"] for section in found["benchmarks"]] == ["wise", "shapes"]


def test_a_preference_is_asked_for_in_both_orders(tmp_path, capsys):
    """The judge likes the brighter image; of prompt 3 always A, of prompt 5 it says nothing."""
    run = make_run(tmp_path / "a", count=6)
    for number, (one, other) in enumerate([(10, 90), (90, 10), (10, 90), (10, 90), (10, 90), (10, 90)]):
        for turn, value in ((1, one), (2, other)):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
                run / "samples" / f"{number:04d}" / f"turn{turn}.png")

    def answer(body):
        text, (a, b) = texts_of(body), images_of(body)
        if "<3>" in text:
            return "Better: A"
        return "Neither." if "<5>" in text else f"**Better: {'A' if a.mean() > b.mean() else 'B'}**"

    with Misbehaving(answer, lambda key, number: "500" if number == 0 else "").running() as server:
        arguments = [str(run), "--out", str(tmp_path / "out"), "--judge", server.url, "--judge_model", "judge"]
        assert comparing.main(arguments) == 0
        requests = sum(server.answered.values())
        assert comparing.main(arguments) == 0 and sum(server.answered.values()) == requests
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["preferences"]["a"]
    assert (found["pairs"], found["by_place"], found["unanswered"]) == (5, 1, 1)
    assert found["share"] == pytest.approx((1 + 0 + 0.5 + 1 + 1) / 5)
    assert "judge prefers turn2 to turn1 in 0.700" in capsys.readouterr().out
    assert "judge prefers turn2 to turn1" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize("change", [
    {"systems": {}}, {"systems": []}, {"systems": {"turn1": {"overall": {"mean": "x"}}}},
    {"systems": {"turn1": 3}}, {"by_prompt": {"turn9": {}}}, {"by_prompt": {"turn1": {"1": "x"}}},
    {"by_prompt": {"turn1": 3}}, {"texts": {"1": 3}}, {"images_per_prompt": 0}, {"images_per_prompt": 10**9},
    {"difference": 3}, {"difference": {"overall": {"mean": 0.0, "ci95": [1]}}}, {"judges": 3}, {"formula": 3}])
def test_a_broken_table_is_told_in_a_sentence(change, tmp_path, capsys):
    run = make_run(tmp_path / "a", count=2, **change)
    assert comparing.main([str(run), "--out", str(tmp_path / "out")]) == 1
    assert str(run / "scores.json") in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.html").exists()


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert comparing.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "holds no scores" in capsys.readouterr().err
    run = make_run(tmp_path / "a", count=2)
    (run / "samples" / "0001" / "turn2.png").write_bytes(b"no image")
    assert comparing.main([str(run), "--out", str(tmp_path / "out")]) == 1
    assert "turn2.png" in capsys.readouterr().err


def test_a_picture_is_never_taken_from_outside(tmp_path):
    run = make_run(tmp_path / "a", count=2)
    secret = tmp_path / "secret.png"
    (run / "samples" / "0001" / "turn2.png").rename(secret)
    (run / "samples" / "0001" / "turn2.png").symlink_to(secret)
    with pytest.raises(ValueError, match="turn2.png: leads out of the folder"):
        read_entry(run, "a")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [tmp_path / name / "eval" / "wise" for name in ("seed0", "seed1")]
    assert comparing._labels(runs) == ["seed0/eval/wise", "seed1/eval/wise"]
    assert comparing._labels(runs[:1]) == ["wise"]
