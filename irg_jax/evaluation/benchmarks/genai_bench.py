"""GenAI-Bench: compositional prompts, each image scored by VQAScore. One image each of 1,600, or of 527.

Skills, `basic` and `advanced` are tags of prompts. `overall` is the mean over all prompts that have any tag.

Source: Li et al., arXiv 2406.13743; github.com/linzhiqiu/t2v_metrics (3.0; later ones have no clip-flant5).
"""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, Scoring, find, read_json
from irg_jax.evaluation.intervals import Group

SCORES = "scores.json"
FIRST = ("basic", "advanced")


def _read(folder: pathlib.Path) -> list[Prompt]:
    entries, skills = (read_json(find(folder, f"{name}.json")) for name in ("genai_image", "genai_skills"))
    if not isinstance(entries, dict) or not isinstance(skills, dict):
        raise ValueError(f"{folder}: genai_image.json and genai_skills.json must hold objects")
    if not set(FIRST) <= set(skills):
        raise ValueError(f"{folder}/genai_skills.json lacks {' or '.join(FIRST)}; get it again")
    tags: dict[str, list[str]] = {name: [] for name in entries}
    for tag, numbers in skills.items():
        for number in numbers if isinstance(numbers, list) else ():
            name = f"{number:05d}" if type(number) is int else str(number)
            if name not in tags:
                raise ValueError(f"{folder}/genai_skills.json: {tag[:40]!r} names the prompt {name[:40]!r}, "
                                 "which genai_image.json lacks; they are not of one version")
            tags[name].append(tag)
    prompts = []
    for name, entry in entries.items():
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not re.fullmatch(r"\d{5}", name, re.ASCII) or not isinstance(text, str):
            raise ValueError(f"{folder}/genai_image.json: {name[:40]!r} is no five digits with a prompt")
        prompts.append(Prompt(name, "", text, {"skills": tags[name]}))
    return prompts


def _paths(prompt: Prompt, system: str) -> tuple[str, ...]:
    return (f"{system}/{prompt.id}.jpeg",)


def score(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of `scores.json`: a list in the order of the prompts, or an object by id. Raises: ValueError if not all.
    """
    got = np.stack([_read_scores(prompts, results / system / SCORES) for system in systems])
    skills = [set(prompt.details["skills"]) for prompt in prompts]
    names = [*FIRST, *sorted(set().union(*skills) - set(FIRST))]
    chosen = {name: np.array([name in each for each in skills]) for name in names}
    groups = {name: Group(got[:, which], np.ones(which.sum())) for name, which in chosen.items() if which.any()}
    groups["all"] = Group(got[:, (tagged := np.array([bool(each) for each in skills]))], np.ones(tagged.sum()))
    columns = {name: {name: 1.0} for name in groups if name != "all"}
    return Scoring(groups, columns | {"overall": {"all": 1.0}}, got)


def _read_scores(prompts: Sequence[Prompt], path: pathlib.Path) -> list[float]:
    values = read_json(path)
    if isinstance(values, list) and len(values) == len(prompts):
        values = dict(zip([prompt.id for prompt in prompts], values))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a list of {len(prompts)} scores, or an object by id")
    wrong = [prompt.id for prompt in prompts if type(values.get(prompt.id)) not in (int, float)
             or not 0 <= values[prompt.id] <= 1]
    if wrong:
        raise ValueError(f"{path}: no score of 0 to 1 of {len(wrong)} prompts, {', '.join(wrong[:10])}")
    return [values[prompt.id] for prompt in prompts]


def _protocol(count: int) -> Protocol:
    home = "zhiqiulin/GenAI-Bench-527" if count == 527 else "BaiqiL/GenAI-Bench-1600"
    return Protocol(
        name="genai_bench", version=str(count), counts={"": count}, images=1, read=_read, paths=_paths,
        score=score, source=f"genai_image.json and genai_skills.json of huggingface.co/datasets/{home}",
        formula="VQAScore (clip-flant5-xxl); basic, advanced and each skill are means over their prompts, "
                "overall over all that have a skill",
        howto="pip install t2v-metrics==3.0; python -m genai_bench.evaluate --output_dir {official} "
              "--gen_model {system} --num_prompts " + str(count) + "; then, for no .pt file is read here, in "
              "that environment: python -c \"import json, sys, torch; json.dump(torch.load(sys.argv[1])"
              ".mean(1).flatten().tolist(), open(sys.argv[2], 'w'))\" ITS_RESULT.pt "
              "{results}/{system}/" + SCORES)


PROTOCOLS = (_protocol(1600), _protocol(527))
