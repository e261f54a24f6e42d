"""The paper's effect on the miniature: seeds, further turns, when to stop, length of thoughts, sight, ablation.

    python benchmarks/effect.py seeds --out runs/effect       the main job with seeds 0, 1, 2
    python benchmarks/effect.py turns --run runs/shapes       four turns of a trained model
    python benchmarks/effect.py stop --run runs/shapes        rules that end a trajectory early
    python benchmarks/effect.py length --run runs/shapes      gain of turn 2 against the words of its thought
    python benchmarks/effect.py sight --run runs/shapes       turn 2 after another prompt's first picture
    python benchmarks/effect.py ablation --run runs/shapes    base; better images; trajectories; six modes

Each runs public commands (finished ones find their work done; `sight` draws by itself), prints a table, writes
benchmarks/results/effect_<name>.json and prints it last. --run is a finished `launch/local.sh`; `seeds` takes
such a run for seed N if it lies at OUT/seedN.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import machine
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import shapes_generate  # noqa: E402
from data_pipelines.config import from_config_dict  # noqa: E402
from data_pipelines.shapes.score import score  # noqa: E402
from irg_jax.evaluation.results import SYSTEMS, read_results  # noqa: E402
from irg_jax.evaluation.shapes import read_prompts  # noqa: E402
from irg_jax.evaluation.statistics import (  # noqa: E402
    Interval,
    align_verdicts,
    paired_bootstrap,
    score_table,
)
from irg_jax.sampling.config import SamplingConfig  # noqa: E402
from irg_jax.sampling.opening import in_batches, load_generator  # noqa: E402
from irg_jax.sampling.trajectory import fork  # noqa: E402

TURNS = 4
NOTHING_ASKED = r"the picture must have all things\.\n.*\ndraw all anew\."   # what right pictures are told
GROUPS = 4       # of prompts, by the length of the second thought
DRAW = ("--benchmark", "shapes", "--config", "configs/shapes_generate.py")


def run(*arguments: str) -> None:
    """A command of the repository's root; its output passes through."""
    print("$", *arguments, flush=True)
    subprocess.run(arguments, cwd=ROOT, check=True)


def python(*arguments: str) -> None:
    run(sys.executable, *arguments)


def difference(results: Sequence[Any], one: str, other: str) -> dict[str, Any]:
    """Mean and 95 % interval of one system minus another, as the report has it."""
    verdicts = align_verdicts(results)
    return as_json(paired_bootstrap(verdicts.correct[one], verdicts.correct[other], seed=0,
                                    strata=verdicts.categories))


def as_json(interval: Interval) -> dict[str, Any]:
    return {"mean": round(interval.mean, 4), "ci95": [round(interval.low, 4), round(interval.high, 4)]}


def overall(results: Sequence[Any]) -> dict[str, float]:
    return {system: round(scores["overall"], 4) for system, scores in score_table(results).items()}


def measure_seeds(flags: argparse.Namespace) -> dict[str, Any]:
    """The main job once a seed: scores, both differences, time and memory."""
    cases = []
    for seed in flags.seeds:
        folder = pathlib.Path(flags.out) / f"seed{seed}"
        if not (ROOT / folder / "report.json").exists():
            run("bash", "launch/local.sh", "--seed", str(seed), "--out", str(folder))
        report = json.loads((ROOT / folder / "report.json").read_text(encoding="utf-8"))
        cases.append({"seed": seed, **{system: report[system]["overall"] for system in SYSTEMS},
                      **{name: report[name] for name in ("turn2_minus_turn1", "turn1_minus_base")},
                      "outcomes": report["outcomes"], "seconds": report["seconds"],
                      "peak_rss_gib": report["peak_rss_gib"]})
    for case in cases:
        print_row(f"seed {case['seed']}", *(case[system] for system in SYSTEMS), case["turn2_minus_turn1"],
                  case["turn1_minus_base"])
    return {"cases": cases}


def draw_turns(flags: argparse.Namespace) -> list[Any]:
    """The results of TURNS turns of the held-out prompts."""
    folder = pathlib.Path(flags.run, "eval", f"turns{TURNS}")
    python("-m", "irg_jax.evaluate", *DRAW, "--base", f"{flags.run}/base", "--checkpoint",
           f"{flags.run}/stage2", "--prompts", f"{flags.run}/data/prompts_heldout.jsonl",
           "--out", str(folder), "--turns", str(TURNS))
    return read_results(ROOT / folder / "results.jsonl")


def measure_turns(flags: argparse.Namespace) -> dict[str, Any]:
    """Scores of turns 1 to TURNS, and what each adds to the first."""
    results = draw_turns(flags)
    scores = overall(results)
    gains = {f"turn{turn}_minus_turn1": difference(results, f"turn{turn}", "turn1")
             for turn in range(2, TURNS + 1)}
    for name, score in scores.items():
        print_row(name, score, *([gains[f"{name}_minus_turn1"]] if f"{name}_minus_turn1" in gains else []))
    return {"scores": scores, **gains}


def measure_stop(flags: argparse.Namespace) -> dict[str, Any]:
    """The last picture's score, and pictures drawn, by the rules of `stop_text` and `stop_change`."""
    turns: dict[str, list[Any]] = {}
    for result in draw_turns(flags):
        if result.system.startswith("turn"):
            turns.setdefault(result.id, []).append(result)
    cases, before = [], None
    for rule in ({"num_turns": 2}, {"num_turns": 2, "stop_text": NOTHING_ASKED}, {},
                 {"stop_text": NOTHING_ASKED}, *({"stop_change": levels} for levels in (2.0, 5.0, 10.0))):
        last = [last_turn(sorted(one, key=lambda turn: turn.system), **rule) for one in turns.values()]
        right = np.array([turn.correct for turn, _ in last])
        before = right if before is None else before
        cases.append({**rule, "score": round(float(right.mean()), 4),
                      "minus_two_turns": as_json(paired_bootstrap(right, before, seed=0)),
                      "pictures": round(float(np.mean([drawn for _, drawn in last])), 3)})
        print_row(str(rule), cases[-1]["score"], cases[-1]["minus_two_turns"], cases[-1]["pictures"])
    return {"cases": cases}


def last_turn(turns: Sequence[Any], num_turns: int = TURNS, stop_text: str = "", stop_change: float = 0.0
              ) -> tuple[Any, int]:
    """The turn that `Generator.trajectories` ends with by such rules, and how many pictures were drawn."""
    picture = lambda turn: np.asarray(Image.open(turn.image).convert("RGB")).astype(int)
    for number in range(1, num_turns):
        if stop_text and re.search(stop_text, turns[number].text):
            return turns[number - 1], number
        if stop_change and np.abs(picture(turns[number]) - picture(turns[number - 1])).mean() < stop_change:
            return turns[number], number + 1
    return turns[num_turns - 1], num_turns


def measure_length(flags: argparse.Namespace) -> dict[str, Any]:
    """The prompts in GROUPS of equal size by the words of the second thought; what turn 2 gained in each."""
    results = read_results(ROOT / flags.run / "eval" / "shapes" / "results.jsonl")
    verdicts = align_verdicts(results)
    words = {result.id: len(result.text.split()) for result in results if result.system == "turn2"}
    lengths = np.array([words[name] for name in verdicts.ids])
    gain = verdicts.correct["turn2"].astype(float) - verdicts.correct["turn1"]
    cases = []
    for rows in np.array_split(np.argsort(lengths, kind="stable"), GROUPS):
        right = {turn: verdicts.correct[turn][rows] for turn in ("turn1", "turn2")}
        cases.append({"words": [int(lengths[rows].min()), int(lengths[rows].max())], "prompts": len(rows),
                      "turn1": round(float(right["turn1"].mean()), 4),
                      "gain": as_json(paired_bootstrap(right["turn2"], right["turn1"], seed=0))})
        print_row("{} to {} words".format(*cases[-1]["words"]), cases[-1]["turn1"], cases[-1]["gain"])
    return {"cases": cases, "correlation": round(float(np.corrcoef(lengths, gain)[0, 1]), 4)}


def measure_sight(flags: argparse.Namespace) -> dict[str, Any]:
    """Turn 2 after the model's own first pictures and, all else alike, after those of the next prompts."""
    folder = ROOT / flags.run / "eval" / "shapes"
    prompts = read_prompts(ROOT / flags.run / "data" / "prompts_heldout.jsonl")
    results = read_results(folder / "results.jsonl")
    first = {result.id: result for result in results if result.system == "turn1"}
    thoughts = [first[prompt.id].text for prompt in prompts]
    pictures = [np.asarray(Image.open(first[prompt.id].image).convert("RGB")) for prompt in prompts]
    config = from_config_dict(SamplingConfig, shapes_generate.get_config())
    generator, _ = load_generator(str(ROOT / flags.run / "stage2"), config, prompts={})
    right: dict[str, list[bool]] = {"own": [], "of the next prompt": []}
    for batch, padded in in_batches(range(len(prompts)), config.batch_size):
        state = generator.begin([prompts[i].prompt for i in padded], seeds=padded)
        _, state = generator.think(state, [thoughts[i] for i in padded])
        for step, verdicts in enumerate(right.values()):
            after = generator.look(fork(state), [pictures[(i + step) % len(prompts)] for i in padded])
            _, after = generator.think(after)
            images = generator.draw(after)
            verdicts += [score(prompts[i].request, image).correct for i, image in zip(batch, images)]
    own, other = (np.array(verdicts) for verdicts in right.values())
    gain = as_json(paired_bootstrap(own, other, seed=0, strata=[prompt.category for prompt in prompts]))
    for name, verdicts in right.items():
        print_row(f"turn 2, first picture {name}", float(np.mean(verdicts)))
    print_row("own minus the next prompt's", gain)
    return {"scores": {name: round(float(np.mean(verdicts)), 4) for name, verdicts in right.items()},
            "own_minus_next": gain}


def measure_ablation(flags: argparse.Namespace) -> dict[str, Any]:
    """What each ingredient adds, at an equal number of steps: images alone, trajectories, all six modes."""
    base, folder = f"{flags.run}/base", pathlib.Path(flags.run, "ablation")
    python("-m", "data_pipelines.build", "--config", "configs/shapes_data.py:images", "--source", "shapes",
           "--format", "parquet", "--out", str(folder / "data"))
    for name, data, moments in (("images", folder / "data", ""),
                                ("trajectories", f"{flags.run}/data", f"{flags.run}/moments")):
        python("-m", "irg_jax.train", "--config", f"configs/shapes_ablation.py:{name}", "--workdir",
               str(folder), f"--config.init_from={base}", f"--config.data.source={data}",
               f"--config.data.moments={moments}")
    python("-m", "irg_jax.evaluate", *DRAW, "--base", str(folder / "images"),
           "--checkpoint", str(folder / "trajectories"), "--prompts", f"{flags.run}/data/prompts_heldout.jsonl",
           "--out", str(folder / "eval"))
    whole, parts = (align_verdicts(read_results(ROOT / evaluated / "results.jsonl"))
                    for evaluated in (f"{flags.run}/eval/shapes", folder / "eval"))
    rows = {"base": (whole.correct["base"],), "+ better images only": (parts.correct["base"],),
            "+ full trajectories": (parts.correct["turn1"], parts.correct["turn2"]),
            "+ six modes": (whole.correct["turn1"], whole.correct["turn2"])}
    cases, before = {}, rows["base"]
    for name, row in rows.items():    # each turn less the same turn of the row above, or its only one
        gains = [as_json(paired_bootstrap(right, above, seed=0, strata=whole.categories))
                 for right, above in zip(row, (*before, *before[-1:]))]
        scores = [round(float(right.mean()), 4) for right in row]
        print_row(name, *scores, *gains)
        cases[name], before = {"scores": scores, "less_the_row_above": gains}, row
    return {"cases": cases}


def print_row(name: str, *values: float | Mapping[str, Any]) -> None:
    """A row of a Markdown table."""
    cells = [f"{value:.2f}" if isinstance(value, float) else
             "{:+.2f} [{:+.2f}, {:+.2f}]".format(value["mean"], *value["ci95"]) for value in values]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


MEASURES = {"seeds": measure_seeds, "turns": measure_turns, "stop": measure_stop, "length": measure_length,
            "sight": measure_sight, "ablation": measure_ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--run", default="runs/shapes", help="folder of a finished main job")
    parser.add_argument("--out", default="runs/effect", help="folder of the runs of `seeds`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args()
    about = machine.describe("jax", "flax", "numpy")
    result = {"benchmark": f"effect_{flags.measure}", **about, **MEASURES[flags.measure](flags)}
    machine.keep(result, machine.RESULTS / f"effect_{flags.measure}.json")


if __name__ == "__main__":
    main()
