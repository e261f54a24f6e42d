"""TIIF-Bench: instructions of 39 types, each in a short and a long wording, judged by yes/no questions.

Nine leaves are means of types, `overall` is the mean of the nine leaves; the averages of the basic and the
advanced group are means over their types. Short and long are scored apart.

Source: Wei et al., arXiv 2506.02161; github.com/A113N-W3I/TIIF-Bench, eval/summary_dimension_results.py.
"""

import functools
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, Scoring, find, read_json, read_records
from irg_jax.evaluation.intervals import Group

LENGTHS = ("short", "long")
_HARD = ("numeracy", "comparison", "differentiation", "negation")
_BASIC = {
    "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "reasoning": ("numeracy", "negation", "differentiation", "comparison"),
}
_ADVANCED = {
    "attribute+relation": ("action+color", "action+texture", "color+2d", "color+3d", "shape+2d", "shape+3d",
                           "texture+2d", "texture+3d"),
    "attribute+reasoning": tuple(f"{one}+{other}" for one in _HARD for other in ("color", "texture")),
    "relation+reasoning": tuple(f"{one}+{other}" for one in _HARD for other in ("2d", "3d")),
    "text": ("text",),
    "style": ("style",),
}
LEAVES = {**_BASIC, **_ADVANCED, "real world": ("real_world",)}
AVERAGES = {"basic": sum(_BASIC.values(), ()), "advanced": sum(_ADVANCED.values(), ())}
TYPES = sum(LEAVES.values(), ())


def _read(folder: pathlib.Path, *, name: str) -> list[Prompt]:
    prompts = []
    for kind in TYPES:
        files = [find(folder, *(f"{home}{name}_{what}/{kind}_{what}.jsonl" for home in ("data/", "")))
                 for what in ("prompts", "eval_prompts")]
        asked = read_records(files[0], {"short_description": str, "long_description": str})
        judged = read_records(files[1], {"yn_question_list": list, "yn_answer_list": list})
        if len(asked) != len(judged):
            raise ValueError(f"{files[0]} has {len(asked)} lines, {files[1]} {len(judged)}: they are not of "
                             "one version")
        for number, (record, judge) in enumerate(zip(asked, judged)):
            questions, answers = (judge[f"yn_{what}_list"] for what in ("question", "answer"))
            if not questions or len(questions) != len(answers) or not all(
                    isinstance(item, str) for item in questions + answers) or any(
                    answer.strip().lower() not in ("yes", "no") for answer in answers):
                raise ValueError(f"{files[1]}, line {number + 1}: needs as many answers yes or no as questions")
            for length in LENGTHS:
                prompts.append(Prompt(f"{kind}_{number}_{length}", kind, record[f"{length}_description"], {
                    "index": number, "length": length, "questions": [" ".join(q.split()) for q in questions],
                    "answers": [answer.strip().lower() for answer in answers]}))
    return prompts


def _paths(prompt: Prompt, system: str) -> tuple[str, ...]:
    return (f"{prompt.category}/{system}/{prompt.details['length']}_description/{prompt.details['index']}.png",)


def result_path(prompt: Prompt) -> str:
    """Where the official judge's answer on a prompt lies, below the system's folder."""
    return f"{prompt.category}/{prompt.details['length']}/{prompt.details['index']}.json"


def score(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of the answers as the official script writes them. Raises: ValueError naming what is missing."""
    got = np.stack([[_count_right(prompt, results / system / result_path(prompt)) for prompt in prompts]
                    for system in systems])
    of = np.array([len(prompt.details["questions"]) for prompt in prompts])
    columns, groups = {}, {}
    for length in LENGTHS:
        for kind in TYPES:
            chosen = np.array([prompt.category == kind and prompt.details["length"] == length
                               for prompt in prompts])
            if chosen.any():
                groups[f"{kind} {length}"] = Group(got[:, chosen], of[chosen])
        def mean(kinds: Sequence[str]) -> dict[str, float]:    # of those that are there, as the official script
            names = [name for kind in kinds if (name := f"{kind} {length}") in groups]
            return dict.fromkeys(names, 1 / max(len(names), 1))
        leaves = {f"{leaf} {length}": means for leaf, kinds in LEAVES.items() if (means := mean(kinds))}
        if leaves:
            columns[f"overall {length}"] = {name: weight / len(leaves) for leaf in leaves.values()
                                            for name, weight in leaf.items()}
        columns |= {f"{name} {length}": means for name, kinds in AVERAGES.items() if (means := mean(kinds))}
        columns |= leaves
    return Scoring(groups, columns, got / of)


def _count_right(prompt: Prompt, path: pathlib.Path) -> int:
    if not path.is_file():
        raise ValueError(f"{path} is missing; let the judge finish")
    record, wanted = read_json(path), prompt.details["answers"]
    given = record.get("model_pred") if isinstance(record, dict) else None
    if not isinstance(given, list) or len(given) != len(wanted):
        raise ValueError(f"{path}: field 'model_pred' must hold {len(wanted)} answers; remove the file, and "
                         "judge again")
    return sum(str(one).strip().lower() == other for one, other in zip(given, wanted))


def read_answers(text: str, count: int) -> list[str]:
    """One yes or no a line, whatever follows. Raises: ValueError unless there are `count`."""
    lines = [re.match(r"(?:\d+[.)]\s*)?[*\"']*(yes|no)\b", line.strip(), re.IGNORECASE)
             for line in re.sub(r"(?s).*</think>", "", text).splitlines()]
    found = [match[1].lower() for match in lines if match]
    if len(found) != count:
        raise ValueError(f"{len(found)} answers to {count} questions: {text[:200]!r}")
    return found


def _protocol(version: str, count: int) -> Protocol:
    return Protocol(
        name="tiif", version=version, counts={"": 2 * count}, images=1, is_percent=True, paths=_paths,
        score=score, source=f"the folders {version}_prompts and {version}_eval_prompts of "
                            "github.com/A113N-W3I/TIIF-Bench, folder data",
        formula="share of questions answered as wanted, of each type; a leaf is the mean of its types, overall "
                "the mean of nine leaves, basic and advanced the means of their 12 and 26 types",
        read=functools.partial(_read, name=version),
        howto="this command with --judge URL --judge_model MODEL, or eval/eval_with_vlm.py of TIIF-Bench with "
              "--image_dir {official} --eval_model {system} --output_dir {results}")


PROTOCOLS = (_protocol("testmini", 277), _protocol("test", 2538))
