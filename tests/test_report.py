"""The report command on synthetic runs: what it counts, what it shows, and what it refuses."""

import html.parser
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from irg_jax import report
from irg_jax.evaluation import curves, page
from irg_jax.evaluation.results import SYSTEMS, read_run
from irg_jax.evaluation.training_log import METRICS, read_metrics

CATEGORIES = ("single_object", "counting", "position")
HOSTILE = "<script>alert('x')</script> & \"quotes\" <img src=http://evil.example/a.png>"


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_results(generator: np.random.Generator, num_prompts: int) -> list[dict]:
    rates = {"base": 0.3, "self_cot": 0.4, "turn1": 0.5, "turn2": 0.7}
    return [{"id": f"{n:04d}", "category": CATEGORIES[n % 3], "prompt": f"prompt {n} {HOSTILE}",
             "system": system, "correct": bool(generator.random() < rates[system]),
             "reasons": [HOSTILE], "seen": ["red circle (0.3, 0.5)"],
             "image": f"images/{n:04d}_{system}.png",
             "text": f"<think>{HOSTILE}\n### Fix\n{HOSTILE}"}
            for n in range(num_prompts) for system in SYSTEMS]


def make_run(folder: pathlib.Path, *, seed: int = 0, num_prompts: int = 30) -> pathlib.Path:
    generator = np.random.default_rng(seed)
    evaluation = folder / "eval" / "shapes"
    results = make_results(generator, num_prompts)
    write_lines(evaluation / "results.jsonl", results)
    (evaluation / "images").mkdir()
    for record in results:
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(evaluation / record["image"])
    manifest = {"prompts": num_prompts, "seed": seed, "checkpoints": {"irg": "stage2"},
                "settings": {"steps": 9}, "versions": {"jax": "0"}, "command": HOSTILE,
                "seconds": 12.5, "peak_rss_gib": 1.5}
    (evaluation / "manifest.json").write_text(json.dumps(manifest))
    for stage in ("stage1", "stage2"):
        records = [{"step": step, **dict.fromkeys(METRICS, 1.0 / step)} for step in range(1, 41)]
        write_lines(folder / stage / "metrics.jsonl", records)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def edit_line(path: pathlib.Path, number: int, **changes) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[number - 1] = {key: value for key, value in (records[number - 1] | changes).items()
                           if value is not ...}
    write_lines(path, records)


def test_report_json_counts_what_is_in_the_results(run, capsys):
    assert report.main([str(run)]) == 0
    written = json.loads((run / "report.json").read_text())
    records = [json.loads(line) for line in (run / "eval/shapes/results.jsonl").open()]
    score = {}
    for system in SYSTEMS:
        parts = [[record["correct"] for record in records
                  if (record["system"], record["category"]) == (system, category)]
                 for category in CATEGORIES]
        score[system] = {category: sum(part) / len(part)
                         for category, part in zip(CATEGORIES, parts, strict=True)}
        score[system]["overall"] = sum(score[system].values()) / 3
        assert written[system] == pytest.approx(score[system])
    for name in ("turn2_minus_turn1", "turn1_minus_base"):
        a, b = name.split("_minus_")
        assert set(written[name]) == {"mean", "ci95"}
        assert written[name]["mean"] == pytest.approx(score[a]["overall"] - score[b]["overall"])
        assert written[name]["ci95"][0] < written[name]["mean"] < written[name]["ci95"][1]
    assert sum(written["outcomes"].values()) == written["prompts"] == 30
    assert (written["seconds"], written["peak_rss_gib"]) == (12.5, 1.5)
    assert written["command"] == HOSTILE and written["versions"] == {"jax": "0"}
    printed = capsys.readouterr().out
    assert f"{score['turn2']['overall']:.2f}" in printed and str(run / "report.html") in printed


def test_table_is_aligned(run, capsys):
    report.main([str(run)])
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == ["overall", "single object", "counting",
                                                         "position"]
    assert len({row.index("[") for row in rows[1:]}) == 1


def test_timings_add_up(run):
    timings = {"build": 10, "stage1": 30.5, "peak_rss_gib": {"stage1": 4}}
    (run / "timings.json").write_text(json.dumps(timings))
    assert report.main([str(run)]) == 0
    written = json.loads((run / "report.json").read_text())
    assert (written["seconds"], written["peak_rss_gib"]) == (40.5, 4.0)


class Collector(html.parser.HTMLParser):
    """Every tag and attribute as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs
                       if name in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_escaped(run):
    report.main([str(run)])
    source = (run / "report.html").read_text(encoding="utf-8")
    seen = Collector()
    seen.feed(source)
    assert not {"script", "link", "iframe", "object", "base"} & set(seen.tags)
    inside = ("data:image/png;base64,", "#")
    assert seen.links and all(link.startswith(inside) for link in seen.links)
    assert "url(" not in source and "@import" not in source
    assert HOSTILE in seen.text, "hostile text is shown as text"
    assert "default-src 'none'" in source


def test_page_shows_the_numbers_of_the_report(run):
    report.main([str(run)])
    written = json.loads((run / "report.json").read_text())
    source = (run / "report.html").read_text(encoding="utf-8")
    for system in SYSTEMS:
        assert f"<b>{written[system]['overall']:.2f}</b>" in source
    counts = re.findall(r"<b>(\d+)</b>(Best: turn 2 fixes|Worst: turn 2 breaks|Both right|Both wrong)", source)
    assert [int(count) for count, _ in counts] == list(written["outcomes"].values())
    assert source.count("<article>") == sum(min(8, count) for count in written["outcomes"].values())


def test_gallery_takes_categories_in_turn(run):
    for group in page.choose_gallery(read_run(run).results, 3):
        shown = [item["turn1"]["category"] for item in group["prompts"]]
        assert len(shown) == min(3, group["count"]) and len(set(shown)) == len(shown)
        sides = {(item["turn1"]["correct"], item["turn2"]["correct"]) for item in group["prompts"]}
        assert sides <= {group["right"]}


def test_a_step_logged_twice_counts_once(run):
    path = run / "stage1" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open()]
    write_lines(path, lines[:20] + [line | {"ce": 7.0} for line in lines[15:]])
    metrics = read_metrics(path, [])
    assert metrics["step"].tolist() == list(range(1, 41))
    assert metrics["ce"][:15].max() <= 1.0 and set(metrics["ce"][15:]) == {7.0}


@pytest.mark.parametrize("changes, words", [
    ({"system": "turn10"}, "'turn10'"),
    ({"correct": 1}, "field 'correct' must be true or false"),
    ({"reasons": "none"}, "field 'reasons' must be a list of strings"),
    ({"seen": ...}, "lacks the field 'seen'"),
    ({"verdict": True}, "unknown field 'verdict'"),
    ({"category": "overall"}, "'overall'"),
    ({"category": "counting"}, "another text or category"),
    ({"system": "base"}, "occurs twice"),
    ({"image": "../../../secret.png"}, "inside the folder"),
    ({"image": "/etc/secret.png"}, "inside the folder"),
    ({"image": "images/\0.png"}, "inside the folder"),
    ({"image": "manifest.json"}, "inside the folder"),
    ({"image": "images/absent.png"}, "does not exist"),
    ({"prompt": "half a pair \ud800"}, "not valid JSON"),
])
def test_malformed_results_are_refused_with_file_and_line(run, capsys, changes, words):
    (run.parent / "secret.png").write_bytes(b"secret")
    edit_line(run / "eval/shapes/results.jsonl", 3, **changes)
    assert_refused(run, capsys, "results.jsonl, line 3", words)


@pytest.mark.parametrize("line, words", [
    (b"{", "not valid JSON"), (b"[1]", "must be a JSON object"), (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"), (b'{"step": NaN}', "not a finite number"),
    (b'{"step": 1e999}', "not a finite number"), (b'{"step": 1}', "lacks the field 'time'"),
    (b"", "not valid JSON"),
])
def test_malformed_metrics_are_refused_with_file_and_line(run, capsys, line, words):
    path = run / "stage2" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert_refused(run, capsys, "metrics.jsonl, line 41", words)


@pytest.mark.parametrize("value", ["3", True, 10**400, [1]])
def test_metrics_must_be_numbers(run, capsys, value):
    edit_line(run / "stage1/metrics.jsonl", 2, ce=value)
    assert_refused(run, capsys, "stage1/metrics.jsonl, line 2", "field 'ce' must be a number")


def test_an_image_that_links_outside_is_refused(run, capsys):
    outside = run.parent / "secret.png"
    image = run / "eval/shapes/images/0000_base.png"
    image.rename(outside)
    image.symlink_to(outside)
    assert_refused(run, capsys, "line 1", "inside the folder")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_image_is_refused(run, capsys, content):
    for image in (run / "eval/shapes/images").iterdir():
        image.write_bytes(content)
    assert_refused(run, capsys, "_base.png", "not a readable PNG")


def test_half_written_evaluations_are_refused(run, capsys):
    path = run / "eval/shapes/results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-4]))
    assert_refused(run, capsys, "holds 29 prompts", "promises 30")
    path.write_text("".join(lines[:-1]))
    assert_refused(run, capsys, "incomplete", "0029 by turn2")
    path.write_text("".join(line for line in lines if '"self_cot"' not in line))
    assert_refused(run, capsys, "no image by self_cot", "evaluate all four")


def test_an_evaluation_under_way_is_left_out_and_told(run, capsys):
    (run / "eval/shapes/manifest.json").unlink()
    (run / "eval/shapes/progress.json").write_text("{}")
    assert report.main([str(run)]) == 0
    written = json.loads((run / "report.json").read_text())
    note = "eval/shapes: is under way, and left out; let the evaluation finish, then report"
    assert written["notes"] == [note] and note in (run / "report.html").read_text()
    assert "turn2" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval/shapes/manifest.json", "eval/shapes/results.jsonl",
                                  "stage1/metrics.jsonl", "stage2/metrics.jsonl"])
def test_missing_and_empty_files_are_named(run, capsys, name):
    (run / name).write_text("")
    assert_refused(run, capsys, name)
    (run / name).unlink()
    assert_refused(run, capsys, name, "cannot be read")


def assert_refused(run: pathlib.Path, capsys, *words: str) -> None:
    assert report.main([str(run)]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not list(run.glob("*report*")), "a refused run leaves no report behind"


def test_a_fault_keeps_the_old_report_and_leaves_no_rest(run, monkeypatch):
    assert report.main([str(run)]) == 0
    before = (run / "report.html").read_text()
    monkeypatch.setattr(report.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    assert report.main([str(run)]) == 1
    assert (run / "report.html").read_text() == before
    assert not list(run.glob(".*tmp"))


def test_out_is_created_and_the_run_left_alone(run, tmp_path):
    assert report.main([str(run), "--out", str(tmp_path / "new" / "place")]) == 0
    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} == {"report.json",
                                                                              "report.html"}
    assert not (run / "report.json").exists()


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.0, 3e-4), (-2.3, 17.0), (5.0, 5.001)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = curves.choose_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize("values", [np.zeros(50), np.full(50, 3.0), np.geomspace(1e-3, 1e3, 50)])
def test_curves_stay_inside_their_panel(values):
    metrics = {stage: {"step": np.arange(50.0), **dict.fromkeys(METRICS, values)}
               for stage in ("stage1", "stage2")}
    drawn = [panel.title for panel in curves.draw_panels(metrics)]
    assert drawn == [chart.title for chart in curves.CHARTS if set(chart.names) & set(METRICS)]
    for panel in curves.draw_panels(metrics):
        assert panel.ticks
        for curve in panel.curves:
            points = np.array([point.split(",") for point in curve.band.split()], float)
            assert (points >= [curves.LEFT, curves.TOP]).all()
            assert (points <= [curves.RIGHT, curves.BOTTOM]).all()
