"""The five benchmarks: prompts, counts, layouts and formulas, against the paper's own rows."""

import json

import numpy as np
import pytest

from benchmark_cases import (
    MAKE,
    VERSION,
    make_tiif,
    make_wise,
    write_genai_scores,
    write_lines,
    write_oneig_table,
)
from irg_jax.evaluation.benchmarks import geneval, judging, oneig, tiif, wise
from irg_jax.evaluation.benchmarks.protocol import digest
from irg_jax.evaluation.benchmarks.running import BENCHMARKS, find_protocol
from irg_jax.evaluation.intervals import score_columns
from irg_jax.evaluation.published import PUBLISHED

TOTALS = {"geneval": 553, "wise": 1000, "tiif": 554, "genai_bench": 527, "oneig": 1120}
PATHS = {   # of the first prompt, as the official scorers want them
    "geneval": [f"turn2/00000/samples/000{image}.png" for image in range(4)],
    "wise": ["turn2/1.png"],
    "tiif": ["shape+color/turn2/short_description/0.png"],
    "genai_bench": ["turn2/00000.jpeg"],
    "oneig": ["images/anime/turn2/000.webp"],
}


def prompts_of(name, folder):
    MAKE[name](folder)
    protocol = find_protocol(name, VERSION.get(name))
    return protocol, protocol.prompts(folder)


def means(protocol, prompts, results, systems=("turn2",)):
    scoring = protocol.score(prompts, results, systems)
    return {name: column.mean for name, column in score_columns(scoring.groups, scoring.columns).items()}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_read_counted_and_named(name, tmp_path):
    protocol, prompts = prompts_of(name, tmp_path)
    assert len(prompts) == TOTALS[name] == len({prompt.id for prompt in prompts})
    assert list(protocol.paths(prompts[0], "turn2")) == PATHS[name]
    paths = [path for prompt in prompts for path in protocol.paths(prompt, "turn2")]
    assert len(set(paths)) == len(paths)
    assert digest(prompts) != digest(prompts[1:])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_says_where_to_get_it(name, tmp_path):
    protocol = find_protocol(name, VERSION.get(name))
    with pytest.raises(ValueError, match="lacks .*; get .*(github.com|huggingface.co)"):
        protocol.prompts(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        protocol.prompts(tmp_path / "nowhere")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_cut_or_broken_are_refused(name, tmp_path):
    """Every file of prompts in turn: cut in half, emptied, other bytes; never another number of prompts."""
    MAKE[name](tmp_path)
    protocol = find_protocol(name, VERSION.get(name))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in files[:4]:
        whole = path.read_bytes()
        for damaged in (whole[:len(whole) // 2], b"", b"\xff\xfe{", b"[1]", b"[" * 100_000, b"{}"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError):
                protocol.prompts(tmp_path)
        path.write_bytes(whole)
    assert protocol.prompts(tmp_path)


def test_versions_are_different_benchmarks(tmp_path):
    make_wise(tmp_path / "verified", suffix="_verified", counts=wise.VERIFIED)
    verified = find_protocol("wise", "verified").prompts(tmp_path / "verified")
    assert [sum(p.category == name for p in verified) for name in wise.VERIFIED] == [400, *[120] * 5]
    with pytest.raises(ValueError, match="lacks WISE_legacy/data/cultural_common_sense.json"):
        find_protocol("wise", None).prompts(tmp_path / "verified")
    make_wise(tmp_path / "legacy")
    legacy = find_protocol("wise", "legacy").prompts(tmp_path / "legacy")
    assert [legacy[i].category for i in (399, 400, 566, 567, 699, 700, 999)] == [
        "cultural", "time", "time", "space", "space", "biology", "chemistry"]
    with pytest.raises(ValueError, match="no version 'new'; use one of legacy, verified"):
        find_protocol("wise", "new")


def test_geneval_gives_the_papers_overall(tmp_path):
    """Images right in the paper's shares, of which the mean of six is 0.8467."""
    protocol, prompts = prompts_of("geneval", tmp_path / "data")
    row = PUBLISHED["geneval", "original"].rows["IRG"]
    seen, lines = dict.fromkeys(row, 0), []
    for number, prompt in enumerate(prompts):
        for image in range(4):
            right = seen[prompt.category] < round(row[prompt.category] * 4 * geneval.TAGS[prompt.category])
            seen[prompt.category] += 1
            lines.append({"filename": f"/x/turn2/{number:05d}/samples/{image:04d}.png", "tag": prompt.category,
                          "prompt": "", "correct": right, "reason": "", "metadata": "{}", "details": "{}"})
    path = tmp_path / "turn2" / geneval.RESULTS
    write_lines(path, lines[::-1])    # in any order
    found = means(protocol, prompts, tmp_path)
    for name, score in row.items():
        assert found[name][0] == pytest.approx(score, abs=0.006)
    assert found["overall"][0] == pytest.approx(0.8467, abs=0.001)
    part = range(5, len(prompts), 9)    # as --limit spreads them
    write_lines(path, [line for number in part for line in lines[4 * number:4 * number + 4]])
    chosen = [prompts[number] for number in part]
    assert protocol.score(chosen, tmp_path, ["turn2"]).shares.shape == (1, len(part))
    with pytest.raises(ValueError, match="00005/samples/0000.png' is no image of these"):
        protocol.score(chosen[1:], tmp_path, ["turn2"])
    for wrong, told in ((lines[1:], "lacks 1 images, 00000/samples/0000.png"), (lines + lines[:1], "twice"),
                        ([{**lines[0], "tag": "counting"}, *lines[1:]], "results of other prompts"),
                        ([{**lines[0], "filename": "../../x.png"}, *lines[1:]], "no image of these"),
                        ([{**lines[0], "correct": 1}, *lines[1:]], "'correct'")):
        write_lines(path, wrong)
        with pytest.raises(ValueError, match=told):
            means(protocol, prompts, tmp_path)


def write_wise(folder, prompts, row):
    """Marks whose category scores are the row's: consistency is spread over 0, 1, 2, the rest follows it."""
    lines = []
    for name, count in wise.LEGACY.items():
        members = [prompt for prompt in prompts if prompt.category == name]
        points = round(2 * row[name] * count)    # of 2 a prompt
        for number, prompt in enumerate(members):
            mark = float((number < points) + (number < points - count))
            lines.append({"prompt_id": int(prompt.id), "Subcategory": "", **dict.fromkeys(wise.MARKS, mark)})
    write_lines(folder / "all_scores_results.jsonl", lines)
    return lines


def test_wise_gives_each_overall_by_its_own_weights(tmp_path):
    protocol, prompts = prompts_of("wise", tmp_path / "data")
    rows = PUBLISHED["wise", "legacy"].rows
    expected = {"IRG": (0.774, 0.778), "BAGEL": (0.501, 0.517), "BAGEL self-CoT": (0.717, 0.697)}
    for name, (weighted, plain) in expected.items():
        write_wise(tmp_path / "turn2", prompts, rows[name])
        found = means(protocol, prompts, tmp_path)
        assert found["time"][0] == pytest.approx(rows[name]["time"], abs=0.004)
        assert found["overall"][0] == pytest.approx(weighted, abs=0.002)
        assert found[wise.PLAIN][0] == pytest.approx(plain, abs=0.002)


def test_wise_marks_weigh_as_told_and_none_is_guessed(tmp_path):
    protocol, prompts = prompts_of("wise", tmp_path / "data")
    lines = [{"prompt_id": int(prompt.id), "consistency": 2, "realism": 1, "aesthetic_quality": 0}
             for prompt in prompts]
    path = tmp_path / "turn2" / "scores.jsonl"
    write_lines(path, lines)
    assert means(protocol, prompts, tmp_path)["overall"][0] == pytest.approx((0.7 * 2 + 0.2) / 2)
    for wrong, told in ((lines[2:], "lacks the marks of 2 prompts, 1, 2"), (lines + lines[:1], "occurs twice"),
                        ([{**lines[0], "realism": 999}, *lines[1:]], "realism is not in 0 to 2"),
                        ([{**lines[0], "realism": True}, *lines[1:]], "realism"),
                        ([{**lines[0], "realism": None}, *lines[1:]], "'realism'")):
        write_lines(path, wrong)
        with pytest.raises(ValueError, match=told):
            means(protocol, prompts, tmp_path)


def test_wise_verified_weighs_by_its_own_counts(tmp_path):
    make_wise(tmp_path / "data", suffix="_verified", counts=wise.VERIFIED)
    protocol = find_protocol("wise", "verified")
    prompts = protocol.prompts(tmp_path / "data")
    write_lines(tmp_path / "turn2" / "scores.jsonl", [
        {"prompt_id": int(prompt.id), "score": float(prompt.category in ("cultural", "time"))}
        for prompt in prompts])
    assert means(protocol, prompts, tmp_path)["overall"][0] == pytest.approx(0.52)


def test_tiif_gives_the_papers_averages(tmp_path):
    """Types as good as their leaf in the paper: all averages come out as printed, overall 76.00/73.77."""
    rng, row = np.random.default_rng(0), PUBLISHED["tiif", "testmini"].rows["IRG"]
    protocol, prompts = prompts_of("tiif", tmp_path / "data")
    leaf_of = {kind: leaf for leaf, kinds in tiif.LEAVES.items() for kind in kinds}
    # 10,000 questions a prompt, so that shares are as fine as the printed ones
    many = {"questions": ["?"] * 10_000, "answers": ["yes"] * 10_000}
    prompts = [prompt._replace(details={**prompt.details, **many}) for prompt in prompts]
    for prompt in prompts:
        share = row[f"{leaf_of[prompt.category]} {prompt.details['length']}"] / 100
        answers = np.where(rng.permutation(10_000) < round(10_000 * share), "Yes", "no").tolist()
        path = tmp_path / "turn2" / tiif.result_path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model_pred": answers}))
    found = means(protocol, prompts, tmp_path)
    for column, printed in row.items():
        assert 100 * found[column][0] == pytest.approx(printed, abs=0.011), column


def test_tiif_questions_of_a_type_are_pooled(tmp_path):
    protocol, prompts = prompts_of("tiif", tmp_path / "data")
    prompts = [p for p in prompts if p.category == "style" and p.details["length"] == "short"][:2]
    one, other = prompts
    other = other._replace(details={**other.details, "questions": ["?"] * 8, "answers": ["yes"] * 8})
    for prompt, given in ((one, ["yes", "yes"]), (other, ["yes"] * 8)):    # the second of `one` should be no
        path = tmp_path / "turn2" / tiif.result_path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model_pred": given}))
    assert means(protocol, [one, other], tmp_path)["style short"][0] == pytest.approx(0.9)
    path.write_text(json.dumps({"model_pred": ["yes"]}))
    with pytest.raises(ValueError, match="must hold 8 answers"):
        means(protocol, [one, other], tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="is missing; let the judge finish"):
        means(protocol, [one, other], tmp_path)


def test_tiif_folders_of_two_versions_are_refused(tmp_path):
    make_tiif(tmp_path)
    path = tmp_path / "testmini_eval_prompts" / "style_eval_prompts.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="not of one version"):
        find_protocol("tiif", None).prompts(tmp_path)


def test_genai_bench_means_are_over_the_prompts_of_a_tag(tmp_path):
    protocol, prompts = prompts_of("genai_bench", tmp_path / "data")
    scores = np.random.default_rng(0).random(527)
    write_genai_scores(tmp_path, "turn2", scores.tolist())
    found = means(protocol, prompts, tmp_path)
    assert found["basic"][0] == pytest.approx(scores[:200].mean())
    assert found["advanced"][0] == pytest.approx(scores[200:520].mean())
    assert found["counting"][0] == pytest.approx(scores[150:400].mean())
    assert found["overall"][0] == pytest.approx(scores[:520].mean())    # seven have no tag
    assert list(found)[:2] == ["basic", "advanced"]
    by_name = {prompt.id: score for prompt, score in zip(prompts, scores.tolist())}
    write_genai_scores(tmp_path, "turn2", by_name)
    assert means(protocol, prompts, tmp_path)["overall"][0] == pytest.approx(scores[:520].mean())
    for wrong in (scores[1:].tolist(), [2.0] * 527, [None] * 527, "x", {**by_name, "00003": float("nan")}):
        write_genai_scores(tmp_path, "turn2", wrong)
        with pytest.raises(ValueError, match="scores.json: (must be|no score)"):
            means(protocol, prompts, tmp_path)


@pytest.mark.parametrize("model", ["IRG", "BAGEL", "GPT-4o"])
def test_oneig_gives_the_papers_overall(model, tmp_path):
    protocol, prompts = prompts_of("oneig", tmp_path / "data")
    row = PUBLISHED["oneig", "en"].rows[model]
    for metric, column in oneig.METRICS.items():
        rows = {"other": {"anime": 0.0, column: 0.1}, "turn2": {"anime": 0.0, column: row[metric]}}
        write_oneig_table(tmp_path / "turn2", metric, rows)
        write_oneig_table(tmp_path / "turn2", metric, {"turn2": {column: 0.5}}, time="2025-01-01_00-00-00")
    found = means(protocol, prompts, tmp_path)
    assert found["overall"][0] == pytest.approx(row["overall"], abs=0.0011)
    (tmp_path / "turn2" / "style_score_EN_2026-01-01_00-00-00.csv").write_text(",style\nturn2,nan\n")
    with pytest.raises(ValueError, match="one row of turn2"):
        means(protocol, prompts, tmp_path)


def test_oneig_has_intervals_where_prompts_are_told(tmp_path):
    protocol, prompts = prompts_of("oneig", tmp_path / "data")
    values = np.random.default_rng(0).random(695)
    for metric, column in oneig.METRICS.items():
        write_oneig_table(tmp_path / "turn2", metric, {"turn2": {column: values.mean()}})
    names = [prompt.id for prompt in prompts[:695]]
    single = {name: {"turn2": value} for name, value in zip(names, values.tolist())}
    write_oneig_table(tmp_path / "turn2", "alignment_prompt", single)
    scoring = protocol.score(prompts, tmp_path, ["turn2"])
    columns = score_columns(scoring.groups, scoring.columns)
    half = 1.96 * values.std() / np.sqrt(695)
    assert columns["alignment"].high[0] == pytest.approx(values.mean() + half, abs=0.003)
    assert np.isnan(columns["style"].low[0]) and np.isnan(columns["overall"].low[0])
    np.testing.assert_allclose(scoring.shares[0, :695], values)
    single[names[0]] = {"turn2": 5.0}
    write_oneig_table(tmp_path / "turn2", "alignment_prompt", single)
    with pytest.raises(ValueError, match="do not agree"):
        protocol.score(prompts, tmp_path, ["turn2"])


@pytest.mark.parametrize("text, marks", [
    ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
    ("**Consistency:** 0\n**Realism**: 2\naesthetic quality 1", (0, 2, 1)),
    ("Consistency: 2\nRealism: 1", None), ("Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),
    ("Consistency: 10\nRealism: 1\nAesthetic Quality: 0", None), ("I cannot judge this.", None), ("", None),
    ("Consistency: 2. Consistency 0 would mean nothing\nRealism: 1\nAesthetic Quality: 0", None),
    ("Consistency: 1.5\nRealism: 1\nAesthetic Quality: 0", None),
    ("<think>Consistency: 0?</think>Consistency: 2.\nRealism: 1, as\nAesthetic Quality: 0", (2, 1, 0))])
def test_legacy_answers(text, marks):
    if marks is None:
        with pytest.raises(ValueError):
            wise.read_legacy_answer(text)
    else:
        assert tuple(wise.read_legacy_answer(text)[name] for name in wise.MARKS) == marks


@pytest.mark.parametrize("text, mark", [
    ("Score: 1", 1), ("**Score**: 0", 0), ("<think>Score: 0? no.</think>\nScore: 1", 1), ("1", 1),
    ("Score: 1.", 1), ("Score: 2", None), ("0\n1", None), ("Score: 1\nScore: 0", None), ("Score: 0.5", None),
    ("Score: 0,5", None), ("nothing", None)])
def test_verified_answers(text, mark):
    if mark is None:
        with pytest.raises(ValueError):
            wise.read_verified_answer(text)
    else:
        assert wise.read_verified_answer(text) == {"score": mark}


@pytest.mark.parametrize("text, better", [
    ("Better: A", "A"), ("Better: B.", "B"), ("**Better: (B)**", "B"), ("A", "A"), ("**B**\n", "B"),
    ("better: A, as it is sharper", "A"), ("A clear case: the second image wins", None),
    ("A scene as asked.\nBetter: B", "B"), ("Better: A or B", None), ("Better: A/B", None),
    ("Better: A\nBetter: B", None), ("A is better.\nB is not", None), ("Better: a", None), ("", None)])
def test_preferences(text, better):
    if better is None:
        with pytest.raises(ValueError, match="neither A nor B"):
            judging.read_preference(text)
    else:
        assert judging.read_preference(text) == better


@pytest.mark.parametrize("text, answers", [
    ("yes, it is\nNo - it is square", ["yes", "no"]), ("1. Yes\n2) no", ["yes", "no"]),
    ("**Yes**: red\n\n**no**", ["yes", "no"]), ("Yes", None), ("yes\nno\nyes", None),
    ("yesterday\nnone", None)])
def test_yes_no_answers(text, answers):
    if answers is None:
        with pytest.raises(ValueError):
            tiif.read_answers(text, 2)
    else:
        assert tiif.read_answers(text, 2) == answers
