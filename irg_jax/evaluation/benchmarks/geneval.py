"""GenEval: objects, counts, colours and positions, found by a detector. Four images of each of 553 prompts.

Source: Ghosh et al., arXiv 2310.11513; github.com/djghosh13/geneval. BAGEL's own script draws prompts that
GPT-4o rewrote, which is another benchmark: `rewritten`.
"""

import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, Scoring, find, read_records
from irg_jax.evaluation.intervals import Group

TAGS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
IMAGES = 4
RESULTS = "results.jsonl"
_FILE = re.compile(r"(\d+)/samples/(\d+)\.png$", re.ASCII)


def _read(*names: str):
    def read(folder: pathlib.Path) -> list[Prompt]:
        records = read_records(find(folder, *names), {"tag": str, "prompt": str, "include": list})
        return [Prompt(f"{number:05d}", record["tag"], record["prompt"], record)
                for number, record in enumerate(records)]
    return read


def _paths(prompt: Prompt, system: str) -> tuple[str, ...]:
    return tuple(f"{system}/{prompt.id}/samples/{number:04d}.png" for number in range(IMAGES))


def _beside(prompt: Prompt, system: str) -> dict[str, str]:
    return {f"{system}/{prompt.id}/metadata.jsonl": json.dumps(prompt.details) + "\n"}


def score(prompts: Sequence[Prompt], results: pathlib.Path, systems: Sequence[str]) -> Scoring:
    """Of `results.jsonl` as the official script writes it. Raises: ValueError for what lacks or is too much."""
    right = np.stack([_count_right(prompts, results / system / RESULTS) for system in systems])
    tags = np.array([prompt.category for prompt in prompts])
    groups = {tag: Group(right[:, tags == tag], np.full((tags == tag).sum(), IMAGES))
              for tag in dict.fromkeys(tags)}
    columns = {tag: {tag: 1.0} for tag in groups} | {"overall": dict.fromkeys(groups, 1 / len(groups))}
    return Scoring(groups, columns, right / IMAGES)


def _count_right(prompts: Sequence[Prompt], path: pathlib.Path) -> np.ndarray:
    places = {int(prompt.id): number for number, prompt in enumerate(prompts)}    # these may be a part of all
    verdicts: dict[tuple[int, int], bool] = {}
    for number, record in enumerate(read_records(path, {"filename": str, "tag": str, "correct": bool}), 1):
        named = _FILE.search(record["filename"])
        place = (places.get(int(named[1])), int(named[2])) if named else (None, 0)
        if place[0] is None or place[1] >= IMAGES or place in verdicts:
            raise ValueError(f"{path}, line {number}: {record['filename'][:200]!r} is no image of these "
                             "prompts, or occurs twice")
        if record["tag"] != prompts[place[0]].category:
            raise ValueError(f"{path}, line {number}: prompt {named[1]} is of {prompts[place[0]].category}, "
                             f"not of {record['tag'][:40]!r}; these are results of other prompts")
        verdicts[place] = record["correct"]
    missing = [f"{prompt.id}/samples/{sample:04d}.png" for number, prompt in enumerate(prompts)
               for sample in range(IMAGES) if (number, sample) not in verdicts]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} images, {', '.join(missing[:5])}; run the scorer again")
    return np.array([sum(verdicts[number, sample] for sample in range(IMAGES))
                     for number in range(len(prompts))])


def _protocol(version: str, name: str, home: str) -> Protocol:
    return Protocol(
        name="geneval", version=version, counts=TAGS, images=IMAGES,
        source=f"{name} of github.com/{home}",
        formula="share of right images of each of six tags; overall is the mean of the six",
        read=_read(name, f"prompts/{name}"), paths=_paths,
        beside=_beside, score=score,
        howto="python GENEVAL/evaluation/evaluate_images.py {official}/{system} --model-path DETECTOR "
              "--outfile {results}/{system}/" + RESULTS)


PROTOCOLS = (
    _protocol("original", "evaluation_metadata.jsonl", "djghosh13/geneval, folder prompts"),
    _protocol("rewritten", "evaluation_metadata_long.jsonl",
              "bytedance-seed/BAGEL, folder eval/gen/geneval/prompts"))
