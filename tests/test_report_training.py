"""The report of trainings: any stages, finished or not, and whatever their logs hold."""

import io
import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from irg_jax import report
from irg_jax.evaluation import curves
from irg_jax.evaluation.training_log import METRICS, read_metrics, read_stages
from irg_jax.evaluation.training_summary import MAX_EVENTS, MAX_PARTS, count_up, flatten
from test_report import HOSTILE, Collector, make_run, write_lines

SECTIONS = ("Training", "Samples over time", "Goodput", "Starts, stops and faults", "Config")
PARTS = {"training": 812.3, "compiling": 20.1, "away": 300.0, f"own {HOSTILE}": 5.0}


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


def make_stage(folder: pathlib.Path, *, start: float = 1e9, num_steps: int = 40) -> pathlib.Path:
    """A stage with every file there can be."""
    lines = []
    for step in range(num_steps):
        line = {"step": step, "time": start + step, "loss": 2.0, "ce": 1.5, "mse": None if step % 3 else 0.5,
                "grad_norm": 1.0, "tokens_per_second": 3210.0, "step_seconds": 0.5, "mfu": 0.41,
                "hbm_gib": 60.2, "update_ratio": 1e-3, "data_wait_seconds": 1e-4,
                "skipped_steps": step // 20, "bad_records": 2}
        line |= {f"ce/{group}": 1.0 for group in ("initial_full", "improving_full")[:1 + step % 2]}
        line |= {f"grad_norm/{group}": 1.0 for group in ("understanding", "generation")}
        lines.append(line | ({"mse/initial_full": 0.5} if step > 5 else {}))
    write_lines(folder / "metrics.jsonl", lines)
    config = {"total_steps": 4000, "data": {"groups": [{"name": HOSTILE}]}, "betas": [0.9, 0.95],
              "clip": np.inf}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "goodput.json").write_text(json.dumps({"seconds": PARTS, "goodput": 0.93, "starts": 3}))
    write_lines(folder / "events.jsonl", [
        {"time": start, "step": None, "event": "start", "text": HOSTILE},
        {"time": start + 9, "step": 9, "event": "skipped step", "text": "NaN"}])
    (folder / "samples").mkdir()
    for step in range(0, 2100, 100):
        (folder / f"samples/step_{step:06d}.png").write_bytes(png())
        texts = {"step": step, "prompts": [f"a circle {HOSTILE}"],
                 "turns": [[{"text": "first"}, {"text": HOSTILE}]]}
        (folder / f"samples/step_{step:06d}.json").write_text(json.dumps(texts))
    return folder


@pytest.fixture
def stage(tmp_path):
    return make_stage(tmp_path / "run" / "stage1")


def render(run: pathlib.Path) -> tuple[str, dict]:
    """The page, checked to be safe, and report.json."""
    assert report.main([str(run)]) == 0
    source = (run / "report.html").read_text(encoding="utf-8")
    seen = Collector()
    seen.feed(source)
    assert not {"script", "link", "iframe", "object", "base"} & set(seen.tags)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in seen.links)
    assert "default-src 'none'" in source and "url(" not in source
    return source, json.loads((run / "report.json").read_text())


def titles(source: str) -> list[str]:
    return re.findall(r"<h2>(.*)</h2>", source)


def panels(source: str) -> list[str]:
    return re.findall(r"<figcaption>(.*[^>])\n", source)


def text_of(source: str) -> str:
    seen = Collector()
    seen.feed(source)
    return " ".join(seen.text.split())


def test_an_unfinished_stage_alone(tmp_path, capsys):
    run = tmp_path / "run"
    write_lines(run / "stage1" / "metrics.jsonl", [{"step": step, "time": 5.0, "ce": 2.0} for step in range(7)])
    source, written = render(run)
    assert titles(source) == ["Training"] and panels(source) == ["Text loss (CE)"]
    assert "<article>" not in source and "Left out" not in source
    assert written["stages"]["stage1"]["steps"] == 7 and written["stages"]["stage1"]["mse"] is None
    assert "base" not in written and written["notes"] == []
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.split() == "steps loss ce mse tokens/s goodput skipped bad records".split()
    assert second.split() == ["stage1", "7", "-", "2.000", "-", "-", "-", "-", "-"]


def test_everything_a_stage_leaves_is_shown(stage, capsys):
    source, written = render(stage.parent)
    assert titles(source) == list(SECTIONS)
    assert panels(source) == [chart.title for chart in curves.CHARTS
                              if chart.title not in ("Learning rate", "Pack fill")]
    text = text_of(source)
    for part in (HOSTILE, "training: 13 min 32 s, 71.4 %", "goodput 93.0 %", "3 starts", "data.groups.0.name",
                 "[0.9, 0.95]", "Infinity", "skipped step 1", "2001-09-09 01:46:49", "40 of 4,000"):
        assert part in text, part
    summary = written["stages"]["stage1"]
    assert (summary["skipped_steps"], summary["bad_records"], summary["total_steps"]) == (1, 2, 4000)
    assert (summary["mse"], summary["goodput"], summary["starts"]) == (0.5, 0.93, 3)
    assert summary["seconds"] == PARTS and summary["events"] == {"start": 1, "skipped step": 1}
    row = capsys.readouterr().out.splitlines()[1]
    assert re.split(r"\s{2,}", row) == ["stage1", "40 of 4,000", "2.000", "1.500", "0.5000", "3,210", "93%",
                                         "1", "2"]


def test_samples_are_spread_and_the_last_is_there(stage):
    source, written = render(stage.parent)
    steps = written["stages"]["stage1"]["samples"]
    assert len(steps) == 8 and (steps[0], steps[-1]) == (0, 2000) and np.ptp(np.diff(steps)) <= 100
    assert source.count("<img ") == 8 and "8 of 21 shown" in text_of(source)
    assert source.count("<summary>texts</summary>") == 8


def test_an_evaluation_keeps_its_table_beside_the_training(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    make_stage(run / "stage3")
    source, written = render(run)
    assert titles(source) == ["Scores", *SECTIONS, "Trajectories", "How it was made"]
    assert list(written["stages"]) == ["stage1", "stage2", "stage3"]
    assert "overall" in capsys.readouterr().out and "<article>" in source


def test_stages_stand_in_the_order_of_their_first_lines(tmp_path):
    for name, start in (("a", 3e9), ("b", 1e9), ("c", 2e9)):
        make_stage(tmp_path / name, start=start)
    (tmp_path / "nothing").mkdir()
    assert [stage.name for stage in read_stages(tmp_path, [], finished=False)] == ["b", "c", "a"]
    source, written = render(tmp_path)
    assert list(written["stages"]) == ["b", "c", "a"]
    assert source.index("b: 40 steps") < source.index("c: 40 steps") < source.index("a: 40 steps")


def test_values_that_differ_between_stages_are_marked(stage):
    other = make_stage(stage.parent / "stage2", start=2e9)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"total_steps": 7, "more": 1}))
    source, written = render(stage.parent)
    assert "of which 2 differ between the stages" in text_of(source)
    assert re.findall(r"<mark>(.*?)</mark>", source) == ["4000", "7", "1"] and ">absent<" in source
    assert written["config_differences"] == {"total_steps": {"stage1": "4000", "stage2": "7"},
                                             "more": {"stage1": None, "stage2": "1"}}


def test_a_torn_last_line_is_not_mentioned(stage):
    for name in ("metrics.jsonl", "events.jsonl"):
        with (stage / name).open("a") as file:
            file.write('{"step": 41, "ti')
    source, written = render(stage.parent)
    assert written["notes"] == [] and written["stages"]["stage1"]["steps"] == 40
    assert sum(written["stages"]["stage1"]["events"].values()) == 2 and "Left out" not in source


def test_malformed_events_are_counted(stage):
    lines = ["[1]", "{", '{"time": NaN, "event": "a"}', '{"step": 1}', '{"event": "a", "time": 1e300}',
             '{"event": "a", "time": 1e13}', '{"event": "a", "step": -1}', '{"event": "a", "text": 3}', "",
             '{"event": "late"}']
    with (stage / "events.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    source, written = render(stage.parent)
    assert written["notes"] == ["stage1/events.jsonl: 8 lines are no events, and left out"]
    assert written["notes"][0] in text_of(source) and "late 1" in text_of(source)


def test_only_the_last_events_are_shown(stage):
    write_lines(stage / "events.jsonl", [
        {"time": 1e9, "step": step, "event": "bad record", "text": f"row {step}."} for step in range(1234)])
    source, _ = render(stage.parent)
    assert "1,184 earlier events are left out" in source and "bad record 1,234" in text_of(source)
    assert "row 1233." in source and "row 1184." in source and "row 1183." not in source
    assert source.count('<td class="text">') == MAX_EVENTS


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"\\ud800"', b"null"])
@pytest.mark.parametrize("name", ["config.json", "goodput.json", "samples/step_002000.json"])
def test_a_file_that_is_no_object_is_left_out(stage, name, content):
    (stage / name).write_bytes(content)
    source, written = render(stage.parent)
    assert len(written["notes"]) == 1 and written["notes"][0].startswith(f"stage1/{name}: ")
    assert "Left out of this page" in source and f"stage1/{name}" in source


@pytest.mark.parametrize("name, record, words", [
    ("goodput.json", {"seconds": [1]}, "field 'seconds' must be an object"),
    ("goodput.json", {"seconds": {"a": -1, "b": "1", "c": np.nan, "d": 2}}, "seconds of a, b, c must be"),
    ("goodput.json", {"seconds": {"a": 1}, "goodput": 1.5}, "from 0 to 1"),
    ("goodput.json", {"seconds": {"a": 1}, "goodput": np.nan}, "from 0 to 1"),
    ("goodput.json", {"seconds": {"a": 1}, "starts": "3"}, "whole number"),
    ("samples/step_002000.json", {"prompts": [1]}, "prompts must be strings"),
    ("samples/step_002000.json", {"turns": [{"text": "a"}]}, "turns lists of objects"),
    ("samples/step_002000.json", {"turns": [[{"text": 1}]]}, "turns lists of objects"),
])
def test_wrong_fields_are_told(stage, name, record, words):
    (stage / name).write_text(json.dumps(record))
    _, written = render(stage.parent)
    assert len(written["notes"]) == 1 and words in written["notes"][0]


@pytest.mark.parametrize("content, words", [
    (b"", "not a readable PNG"), (b"GIF89a", "not a readable PNG"), (png((4097, 1)), "too large"),
    (png()[:50], "not a readable PNG"), (png() + bytes(16 << 20), "more than the"),
])
def test_a_picture_that_is_none_is_left_out(stage, content, words):
    (stage / "samples/step_002000.png").write_bytes(content)
    source, written = render(stage.parent)
    assert source.count("<img ") == 7 and words in written["notes"][0]


@pytest.mark.parametrize("name", ["samples/step_002000.png", "samples/step_002000.json", "config.json",
                                  "goodput.json", "events.jsonl"])
def test_links_outside_loops_pipes_and_folders_are_left_out(stage, name):
    def make_link(target):
        return lambda path: path.symlink_to(target)
    secret = stage.parent.parent / "secret"
    (stage / name).rename(secret)
    for make in (make_link(secret), make_link(stage / name), make_link("absent"), os.mkfifo, os.mkdir):
        make(stage / name)
        _, written = render(stage.parent)
        assert len(written["notes"]) == 1 and f"stage1/{name}" in written["notes"][0]
        (stage / name).unlink() if not (stage / name).is_dir() else (stage / name).rmdir()


def test_other_names_among_the_samples_do_not_matter(stage):
    for name in ("step_0000001.png", "step_1.png", "step_000001.jpg", ".step_000001.png", "step_00000x.png"):
        (stage / "samples" / name).write_bytes(b"?")
    _, written = render(stage.parent)
    assert written["notes"] == [] and len(written["stages"]["stage1"]["samples"]) == 8


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    path = tmp_path / "run" / "stage1" / "metrics.jsonl"
    values = [1.0, np.nan, np.inf, 1.0]
    write_lines(path, [{"step": step, "time": 1.0, "ce": value, "ce/<b>": "x", "mse": np.nan, HOSTILE: {}}
                       for step, value in enumerate(values)])
    notes = []
    metrics = read_metrics(path, notes)
    assert set(metrics) == {"step", "time", "ce"}
    assert np.isfinite(metrics["ce"]).tolist() == [True, False, False, True]
    assert len(notes) == 1 and "6 values that are not finite" in notes[0]
    source, written = render(tmp_path / "run")
    assert panels(source) == ["Text loss (CE)"] and written["stages"]["stage1"]["ce"] == 1.0
    assert "nan" not in source.lower().replace("not finite", "")


def test_stages_without_a_step_are_told(stage):
    (stage.parent / "stage2").mkdir()
    (stage.parent / "stage2/metrics.jsonl").write_text("")
    source, written = render(stage.parent)
    assert written["notes"] == ["stage2/metrics.jsonl: holds no step yet"]
    assert list(written["stages"]) == ["stage1", "stage2"] and written["stages"]["stage2"]["steps"] == 0
    (stage / "metrics.jsonl").write_text("")
    assert "No step has been logged yet" in render(stage.parent)[0]


@pytest.mark.parametrize("name", ["", "absent", "stage1"])
def test_a_folder_without_a_stage_is_refused(tmp_path, capsys, name):
    make_stage(tmp_path / "run" / "stage1")
    folder = tmp_path / "run" / name if name else tmp_path
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "neither a stage" in message or "is this the folder of a run?" in message
    assert not (tmp_path / "out").exists()


def test_many_stages_groups_and_parts(tmp_path):
    for number in range(20):
        name = f"a_stage_with_a_long_name_{number}{HOSTILE.replace('/', '')}"
        make_stage(tmp_path / name, start=1e9 + number)
    path = sorted(tmp_path.iterdir())[0]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    write_lines(path / "metrics.jsonl", [line | {f"ce/{n:03d}": 1.0 for n in range(500)} for line in lines])
    seconds = {f"part {number}": 1.0 for number in range(30)}
    (path / "goodput.json").write_text(json.dumps({"seconds": seconds}))
    source, written = render(tmp_path)
    assert "more, not drawn" in source and f"{30 - MAX_PARTS + 1} others" in source
    assert len(written["notes"]) == 1 and "metrics are left out" in written["notes"][0]
    for points in re.findall(r'points="([^"]+)"', source):
        x = [float(point.split(",")[0]) for point in points.split()]
        assert min(x) >= 0 and max(x) <= curves.RIGHT


@pytest.mark.parametrize("values", [[5e-324, 1e-323], [1e299, -1e299], [1e16, 1e16 + 2], [1e-299, 1e299],
                                    [0.0], [3], [1e-90, 1e90], [-3, -3]])
def test_extreme_values_are_drawn_inside(values):
    columns = {"step": np.arange(len(values), dtype=float)} | dict.fromkeys(METRICS, np.array(values, float))
    for panel in curves.draw_panels({"a": columns}):
        points = np.array([point.split(",") for point in panel.curves[0].band.split()], float)
        assert panel.ticks and len(points) > 2
        assert (points >= [curves.LEFT, curves.TOP]).all() and (points <= [curves.RIGHT, curves.BOTTOM]).all()


@pytest.mark.parametrize("value, label", [(0.0, "0"), (0.25, "0.25"), (12e3, "12k"), (1.5e-4, "1.5e-4"),
                                          (-2e-5, "-2e-5"), (1e-110, "1e-110"), (3e6, "3M")])
def test_labels_of_ticks_are_short(value, label):
    assert curves.format_short(value) == label


def test_counters_that_begin_anew_add_up():
    assert count_up(np.array([0, 0, 2, np.nan, 2, 0, 1])) == 3
    assert count_up(np.array([4.0])) == 4 and count_up(None) is None


def test_a_config_is_flat_at_any_depth():
    deep = nested = {}
    for _ in range(500):
        nested["a"] = {}
        nested = nested["a"]
    assert flatten({"x": [], "y": {}, "z": [1, [2]], "deep": deep}).items() >= {
        "x": "[]", "y": "{}", "z.0": "1", "z.1": "[2]"}.items()
    assert max(key.count(".") for key in flatten(deep)) < 20
