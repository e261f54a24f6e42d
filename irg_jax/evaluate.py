r"""Draws a benchmark's prompts, and scores every turn's images.

    python -m irg_jax.evaluate --benchmark shapes --config configs/shapes_generate.py \
        --base runs/shapes/base --checkpoint runs/shapes/stage2 \
        --prompts runs/shapes/data/prompts_heldout.jsonl --out runs/shapes/eval/shapes

Four systems draw each prompt from the same noise: `base` (the base model, plainly), `self_cot` (the
base model, which thinks first), `turn1` and `turn2` (the trained model); with --turns it goes on to
`turn3` and further. OUT/results.jsonl has a line an image; OUT/manifest.json, written last, says how
they came to be. Interrupted, the same command goes on.

    python -m irg_jax.evaluate --benchmark geneval --data GENEVAL/prompts --config configs/irgl_generate.py \
        --checkpoint CHECKPOINT --out runs/eval/geneval

The paper's five: geneval, wise, tiif, genai_bench, oneig, whose prompts you bring as --data. OUT/official has
the images as the official scorer wants them, a model a turn, OUT/samples every turn's image and text; --turns 1
thinks and draws once (self-CoT), 0 draws plainly. With --judge URL --judge_model MODEL the judge of wise and
tiif is asked at an OpenAI-compatible endpoint, with --scorer CLONE geneval's detector runs; else copy what the
official scorer wrote to OUT/results/<turn>/, and run the same command again (without --checkpoint it
need not load the weights to compare them). The table is printed, and kept as OUT/scores.json.
docs/evaluation.md tells all.

    python -m irg_jax.evaluate compare RUN ... --out DIR

puts such folders beside each other and beside what was published.
"""

import functools
import pathlib
import platform
import shlex
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.evaluation import comparing
from irg_jax.evaluation.benchmarks import judging, running
from irg_jax.evaluation.recording import Recorder
from irg_jax.evaluation.shapes import HeldOut, digest_prompts, make_result, read_prompts
from irg_jax.parallel.sharding import find_mesh
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.opening import describe_settings, in_batches, load_generator
from irg_jax.sampling.trajectory import Generator, Turn


SEED = 42    # of the paper's five, as in the scripts of GenEval and BAGEL


def draw_base(generator: Generator, prompts: list[str], seeds: list[int]) -> dict[str, list[Turn]]:
    """What the base model draws, plainly and after thinking."""
    thought = trajectories(generator, prompts, seeds=seeds, num_turns=1)
    return {"base": generator.text_to_image(prompts, seeds=seeds),
            "self_cot": [turns[0] for turns in thought]}


def draw_trained(generator: Generator, prompts: list[str], seeds: list[int], num_turns: int
                 ) -> dict[str, list[Turn]]:
    """All turns of the trained model."""
    drawn = trajectories(generator, prompts, seeds=seeds, num_turns=num_turns)
    # One that ended early stays with its last image.
    return {f"turn{number + 1}": [turns[min(number, len(turns) - 1)] for turns in drawn]
            for number in range(num_turns)}


def list_models(num_turns: int) -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Which of a model's images are scored, and what draws them."""
    turns = tuple(f"turn{number + 1}" for number in range(num_turns))
    return {"base": (("base", "self_cot"), draw_base),
            "trained": (turns, functools.partial(draw_trained, num_turns=num_turns))}


def evaluate(prompts: Sequence[HeldOut], *, config: SamplingConfig, checkpoints: dict[str, str],
             recorder: Recorder, seed: int, batch_size: int, num_turns: int = 2,
             mesh: Mesh | None = None) -> None:
    """Draws and scores what `recorder` lacks; `checkpoints` are paths by the names of `list_models`.

    Raises: ValueError if a prompt holds a control token, or weights changed since the evaluation
        began.
    """
    models = list_models(num_turns)
    wanted = [system for systems, _ in models.values() for system in systems]
    progress = tqdm(total=len(prompts) * len(wanted), initial=len(recorder.done), unit="image",
                    disable=None)
    for name, (systems, draw) in models.items():
        generator, weights = load_generator(
            checkpoints[name], config, mesh=mesh,
            prompts={f"prompt {prompt.id}": prompt.prompt for prompt in prompts})
        recorder.identify(name, weights)
        # Of all prompts, whatever is there: with other neighbours the last bits would be others.
        for batch, padded in in_batches(prompts, generator.fit_batch(batch_size)):
            if all((prompt.id, system) in recorder.done for prompt in batch for system in systems):
                continue
            drawn = draw(generator, [prompt.prompt for prompt in padded],
                         [_seed(seed, prompt.id) for prompt in padded])
            for system in systems:
                for prompt, turn in zip(batch, drawn[system]):
                    if (prompt.id, system) not in recorder.done:
                        _record(recorder, prompt, system, turn)
                        progress.update()
            recorder.save()
    progress.close()


def _record(recorder: Recorder, prompt: HeldOut, system: str, turn: Turn) -> None:
    make_record = lambda file: make_result(prompt, system=system, image=turn.image, text=turn.text,
                                           file=file)
    recorder.add(turn.image, make_record, id=prompt.id, system=system)


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every prompt, whatever else is evaluated."""
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0])


def run_shapes(values: Any) -> None:
    _require(values, "config", "base", "checkpoint", "prompts")
    if values.turns < 2:
        raise ValueError(f"--turns is {values.turns}; shapes scores two turns or more")
    config = from_config_dict(SamplingConfig, values.config)
    prompts = read_prompts(values.prompts, limit=values.limit)
    batch_size = min(values.batch or config.batch_size, len(prompts))
    settings, seed = describe_settings(config), values.seed or 0
    recorder = Recorder(values.out, {"seed": seed, "settings": settings, "turns": values.turns,
                                     "prompts": digest_prompts(prompts)})
    is_new = not recorder.is_complete
    evaluate(prompts, config=config, recorder=recorder, seed=seed, batch_size=batch_size,
             num_turns=values.turns, mesh=find_mesh(values.mesh),
             checkpoints={"base": values.base, "trained": values.checkpoint})
    if is_new:
        recorder.finish(prompts=len(prompts), seed=seed, versions=_versions(),
                        settings=settings | {"batch_size": batch_size},
                        command=shlex.join(["python", "-m", "irg_jax.evaluate", *sys.argv[1:]]))
    done = "evaluated" if is_new else "already evaluated:"
    print(f"{done} {len(prompts)} prompts in {values.out}")


def run_benchmark(values: Any) -> None:
    """One of the paper's five."""
    _require(values, "data")
    protocol = running.find_protocol(values.benchmark, values.version)
    prompts = protocol.prompts(values.data)
    if values.limit:   # spread over all categories
        prompts = [prompts[i] for i in np.unique(np.linspace(0, len(prompts) - 1, values.limit).astype(int))]
    job = running.Job(protocol, prompts, pathlib.Path(values.out), values.turns,
                      SEED if values.seed is None else values.seed, values.limit)
    ask = _prepare_judge(values, job)
    if values.checkpoint:
        _require(values, "config")
        config = from_config_dict(SamplingConfig, values.config)
        described = {"command": shlex.join(["python", "-m", "irg_jax.evaluate", *sys.argv[1:]]),
                     "versions": _versions()}
        running.draw(job, config, values.checkpoint, batch_size=values.batch or config.batch_size,
                     mesh=find_mesh(values.mesh), described=described)
    running.prepare(job)
    print(f"{len(prompts)} prompts of {protocol.title} are drawn and laid out in {job.official}", flush=True)
    ask()
    if missing := running.lacking(job):
        print(f"no results yet of {', '.join(missing)}:")
        for system in missing:
            print(" ", job.howto(system))
        return
    table = running.score(job, max_unanswered=values.max_unanswered)
    print(running.format_scores(table, is_percent=protocol.is_percent))


def _prepare_judge(values: Any, job: running.Job) -> Callable[[], None]:
    """What runs the detector or asks the judge, if one is named; their flags are checked at once."""
    if values.scorer:
        if values.benchmark != "geneval":
            raise ValueError(f"--scorer is for geneval; {values.benchmark} is scored so: {job.howto('turn2')}")
        script = running.check_detector(values.scorer, values.scorer_python)
        return lambda: running.detect(job, script, values.scorer_python, values.scorer_model_path)
    if not values.judge:
        return lambda: None
    if not judging.has_judge(job.protocol):
        raise ValueError(f"--judge: {job.protocol.title} has no judge that answers in words; it is scored so: "
                         f"{job.howto('turn2')}")
    template = judging.load_template(judging.name_of(job.protocol), values.judge_prompt)
    endpoint = judging.connect(values, job.out / running.ANSWERS)

    def ask() -> None:
        for system in job.systems:
            judging.judge(job.protocol, job.prompts, system, official=job.official, results=job.results,
                          endpoint=endpoint, template=template)
        print(judging.note_usage(endpoint, job.out / running.USAGE))
    return ask


def _require(values: Any, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(values, name) is None]
    if missing:
        raise ValueError(f"--benchmark {values.benchmark} needs {', '.join(missing)}")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__,
            "device": jax.devices()[0].device_kind}


def main(values: Any) -> None:
    (run_shapes if values.benchmark == "shapes" else run_benchmark)(values)


def _define_judge() -> None:
    """The flags that `judging.connect` reads."""
    flags.DEFINE_string("judge", None, "OpenAI-compatible endpoint of a judge, like http://127.0.0.1:8000/v1.")
    flags.DEFINE_string("judge_model", None, "The judge's name there.")
    flags.DEFINE_string("judge_key", "", "Name of the environment variable that holds the endpoint's key.")
    flags.DEFINE_string("judge_options", judging.OPTIONS, "JSON: further fields of each request.")
    flags.DEFINE_string("judge_prompt", None, "A file with other words for the judge than ours.")
    flags.DEFINE_integer("judge_concurrency", 8, "Requests under way at once.", lower_bound=1)
    flags.DEFINE_list("judge_prices", ["0", "0"], "Price of a million tokens read, and written.")
    flags.DEFINE_float("judge_budget", 0.0, "Nothing more is sent once so much is spent; 0 for no limit.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(comparing.main(sys.argv[2:]))
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_enum("benchmark", "shapes", ["shapes", *running.BENCHMARKS], "What is evaluated.")
    flags.DEFINE_string("version", None, "Of the benchmark; by default the paper's. See docs/evaluation.md.")
    flags.DEFINE_string("data", None, "Folder of the benchmark's own prompt files; shapes needs none.")
    flags.DEFINE_string("base", None, "Of shapes: the base model's checkpoint.")
    flags.DEFINE_string("checkpoint", None, "The trained model: a checkpoint or a stage's folder.")
    flags.DEFINE_string("prompts", None, "Of shapes: its prompts, a .jsonl file.")
    flags.DEFINE_string("out", None, "Folder of the results, RUN/eval/shapes for a report of RUN.")
    flags.DEFINE_integer("limit", None, "Take only so many prompts: the first of shapes, else spread over all.",
                         lower_bound=1)
    flags.DEFINE_integer("seed", None, "Of texts and noise; by default 0 of shapes, else 42.", lower_bound=0,
                         upper_bound=2**32 - 1 - 9)
    flags.DEFINE_integer("turns", 2, "Turns of the trained model; 0 draws plainly, 1 thinks first.",
                         lower_bound=0, upper_bound=9)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.",
                         lower_bound=1)
    flags.DEFINE_string("mesh", "", "Devices to draw on, like data=4,tensor=2; by default the first alone.")
    _define_judge()
    flags.DEFINE_float("max_unanswered", 0.01, "Share of prompts that may be left without a mark, and counted.",
                       lower_bound=0, upper_bound=1)
    flags.DEFINE_string("scorer", None, "Of geneval: a clone of its repository, whose detector is run.")
    flags.DEFINE_string("scorer_python", sys.executable, "The Python that has the detector's packages.")
    flags.DEFINE_string("scorer_model_path", None, "Folder of the detector's weights.")
    flags.mark_flags_as_required(["out"])
    command.run(main)
