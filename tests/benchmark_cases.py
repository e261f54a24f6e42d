"""Prompt files and scorers' outputs in the forms of the five benchmarks, with words of our own."""

import csv
import json
import pathlib
from collections.abc import Mapping

from irg_jax.evaluation.benchmarks import genai_bench, geneval, oneig, tiif, wise


def write_lines(path: pathlib.Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_geneval(folder: pathlib.Path) -> None:
    write_lines(folder / "evaluation_metadata.jsonl", [
        {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"{tag} {number}"}
        for tag, count in geneval.TAGS.items() for number in range(count)])


def make_wise(folder: pathlib.Path, *, suffix: str = "", counts: Mapping[str, int] = wise.LEGACY) -> None:
    total = sum(counts.values())
    records = [{"Prompt": f"hint {number}", "Explanation": f"answer {number}", "Category": "any",
                "Subcategory": "some", "prompt_id": number} for number in range(1, total + 1)]
    ends = (0, 400, 700 if total == 1000 and not suffix else 640, total)
    for file, start, end in zip(wise.FILES, ends, ends[1:]):
        write_json(folder / f"{file}{suffix}.json", records[start:end])


def make_tiif(folder: pathlib.Path, count: int = 277) -> None:
    for number, kind in enumerate(tiif.TYPES):
        size = count // 39 + (number < count % 39)
        write_lines(folder / "testmini_prompts" / f"{kind}_prompts.jsonl", [
            {"type": kind, "short_description": f"{kind} {i}", "long_description": f"{kind} {i}, at length"}
            for i in range(size)])
        write_lines(folder / "testmini_eval_prompts" / f"{kind}_eval_prompts.jsonl", [
            {"type": kind, "yn_question_list": ["Is it red?", "Is it\nround?"], "yn_answer_list": ["yes", "No"]}
            for _ in range(size)])


def make_genai_bench(folder: pathlib.Path, count: int = 527) -> None:
    write_json(folder / "genai_image.json", {f"{number:05d}": {"prompt": f"prompt {number}", "models": {}}
                                             for number in range(count)})
    write_json(folder / "genai_skills.json", {
        "basic": list(range(200)), "attribute": list(range(0, 200, 2)), "advanced": list(range(200, count - 7)),
        "counting": list(range(150, 400))})


def make_oneig(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "OneIG-Bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category", "id", "prompt_en", "type", "prompt_length", "class"])
        for category, name in oneig.FOLDERS.items():
            for number in range(oneig.COUNTS[name]):
                writer.writerow([category, f"{number:03d}", f'{name}, "{number}"', "NP", "short", "None"])


MAKE = {"geneval": make_geneval, "wise": make_wise, "tiif": make_tiif, "genai_bench": make_genai_bench,
        "oneig": make_oneig}
VERSION = {"genai_bench": "527"}    # the small one


def write_genai_scores(results: pathlib.Path, system: str, scores: list) -> None:
    write_json(results / system / genai_bench.SCORES, scores)


def write_oneig_table(folder: pathlib.Path, metric: str, rows: Mapping[str, Mapping[str, float]],
                      time: str = "2026-01-01_00-00-00") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(next(iter(rows.values())))
    with (folder / f"{metric}_score_EN_{time}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *columns])
        writer.writerows([name, *row.values()] for name, row in rows.items())
