"""One benchmark in one folder: drawn, laid out, judged, scored; each part goes on where it was interrupted.

    OUT/manifest.json                     what is drawn, with what, by which protocol
    OUT/samples/0000/turn1.png, .txt, ... image k of prompt i is in folder i * images + k
    OUT/official/...                      the same images where the official scorer wants them, a model a turn
    OUT/results/<turn>/...                what the scorer or the judge said
    OUT/answers/, usage.json              the judge's answers by content; requests, tokens and cost
    OUT/scores.json                       the table, with 95 % intervals
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from data_pipelines.digests import write_json
from irg_jax.evaluation.benchmarks import geneval
from irg_jax.evaluation.benchmarks.judging import JUDGE, UNANSWERED
from irg_jax.evaluation.benchmarks.layout import check_layout, lay_out, systems_of
from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol, digest
from irg_jax.evaluation.files import parse, read_bytes
from irg_jax.evaluation.folders import Order, generate
from irg_jax.evaluation.intervals import as_json, score_columns, tell_score
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import describe_settings, load_generator

BENCHMARKS = ("geneval", "wise", "tiif", "genai_bench", "oneig")
MANIFEST, SCORES, USAGE, ANSWERS = "manifest.json", "scores.json", "usage.json", "answers"
SEED_RULE = "image k of every prompt has the seed + k"


@dataclasses.dataclass(frozen=True)
class Job:
    """A benchmark and the folder it is done in; `limit` prompts, or all."""

    protocol: Protocol
    prompts: Sequence[Prompt]
    out: pathlib.Path
    num_turns: int       # 0 draws plainly, 1 thinks first, more look again
    seed: int
    limit: int | None = None

    @property
    def systems(self) -> tuple[str, ...]:
        return systems_of(self.num_turns)

    @property
    def official(self) -> pathlib.Path:
        return self.out / "official"

    @property
    def results(self) -> pathlib.Path:
        return self.out / "results"

    def howto(self, system: str) -> str:
        """How the official scorer sees a system's images."""
        return self.protocol.howto.format(official=self.official, results=self.results, system=system)

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same but for weights and settings."""
        return {"benchmark": self.protocol.name, "version": self.protocol.version,
                "prompts": len(self.prompts), "prompts_sha256": digest(self.prompts), "limit": self.limit,
                "images_per_prompt": self.protocol.images, "systems": list(self.systems),
                "num_turns": self.num_turns, "seed": self.seed, "seeds": SEED_RULE}


def find_protocol(name: str, version: str | None) -> Protocol:
    """The version of a benchmark, by default the paper's. Raises: ValueError if there is none of the name."""
    protocols = importlib.import_module(f"irg_jax.evaluation.benchmarks.{name}").PROTOCOLS
    for protocol in protocols:
        if version in (None, protocol.version):
            return protocol
    raise ValueError(f"{name} has no version {version!r}; use one of "
                     f"{', '.join(protocol.version for protocol in protocols)}")


def draw(job: Job, config: SamplingConfig, checkpoint: str, *, batch_size: int,
         mesh: jax.sharding.Mesh | None, described: Mapping[str, Any]) -> None:
    """Draws what OUT lacks. `described` goes into the manifest of a new OUT: command and versions.

    Raises: ValueError if OUT holds another run, or a prompt a control token.
    """
    settings = describe_settings(config)
    found = read_manifest(job.out) if (job.out / MANIFEST).exists() else None
    if not found and job.out.exists() and any(path.name != ANSWERS for path in job.out.iterdir()):
        raise ValueError(f"{str(job.out)!r} holds something else than a drawn benchmark (no {MANIFEST}); "
                         "choose another --out")
    wanted = job.identity() | {"settings": settings}
    if found:
        _compare(job.out, found, wanted)
    start = time.monotonic()
    generator, weights = load_generator(checkpoint, config, mesh=mesh, prompts={
        f"prompt {prompt.id}": prompt.text for prompt in job.prompts})
    if found:
        _compare(job.out, found["checkpoint"], {"sha256": weights["sha256"]})
    manifest = found or wanted | {"checkpoint": weights, "formula": job.protocol.formula, **described}
    seconds = found["seconds"] if found else 0.0
    write_json(job.out / MANIFEST, manifest | {"complete": False, "seconds": seconds})
    orders = [Order(prompt.text, job.seed + image) for prompt in job.prompts for image in range(
        job.protocol.images)]
    pace = generate(orders, generator=generator, seed=job.seed, num_turns=job.num_turns, batch_size=batch_size,
                    checkpoint=weights, out=job.out / "samples")
    seconds += time.monotonic() - start if pace.drawn else 0.0
    write_json(job.out / MANIFEST, manifest | {"complete": True, "seconds": seconds})


def prepare(job: Job) -> None:
    """The official layout of all that is drawn. Raises: ValueError if not all is, or OUT is another run."""
    manifest = read_manifest(job.out)
    _compare(job.out, manifest, job.identity())
    settings = manifest["settings"]
    may_stop = bool(settings.get("stop_text") or settings.get("stop_change"))
    lay_out(job.protocol, job.prompts, job.systems, samples=job.out / "samples", official=job.official,
            may_stop=may_stop)
    check_layout(job.protocol, job.prompts, job.systems, job.official)


def check_detector(repository: str, python: str) -> pathlib.Path:
    """GenEval's script. Raises: ValueError if it is missing, or the Python lacks its packages."""
    script = pathlib.Path(repository) / "evaluation" / "evaluate_images.py"
    if not script.is_file():
        raise ValueError(f"{str(script)!r} does not exist; --scorer is a clone of github.com/djghosh13/geneval")
    packages = "import mmdet, open_clip, clip_benchmark, torch"
    try:
        tried = subprocess.run([python, "-c", packages], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--scorer_python {python!r} does not run ({error})") from error
    if tried.returncode:
        *_, told = tried.stderr.strip().splitlines() or [f"it ended with status {tried.returncode}"]
        raise ValueError(f"{python} lacks GenEval's packages ({told}); set up its environment, and name its "
                         "Python as --scorer_python")
    return script


def detect(job: Job, script: pathlib.Path, python: str, model_path: str | None) -> None:
    """Runs GenEval's own script, with the Python that has its packages, on what has no results yet.

    Raises: ValueError if it fails.
    """
    for system in job.systems:
        results = job.results / system / geneval.RESULTS
        if results.exists():
            continue
        results.parent.mkdir(parents=True, exist_ok=True)
        partial = results.with_name(f".{results.name}.partial")
        command = [python, str(script.resolve()), str((job.official / system).resolve()),
                   "--outfile", str(partial.resolve())]
        ran = subprocess.run(command + (["--model-path", model_path] if model_path else []))
        if ran.returncode or not partial.is_file():
            raise ValueError(f"{script} ended with status {ran.returncode} on {system}; see what it printed")
        partial.rename(results)


def lacking(job: Job) -> list[str]:
    """The systems that no scorer has seen."""
    return [system for system in job.systems
            if not any(path.is_file() for path in (job.results / system).rglob("*"))]


def score(job: Job, *, max_unanswered: float) -> dict[str, Any]:
    """The table as `scores.json`. Prompts whose answers did not parse count for no system, and are named.

    Raises: ValueError if results are missing, broken, or too many are unanswered.
    """
    protocol, folders = job.protocol, {system: job.results / system for system in job.systems}
    unanswered = {system: _read_list(folder / UNANSWERED) for system, folder in folders.items()}
    dropped = set().union(*unanswered.values())
    prompts = [prompt for prompt in job.prompts if prompt.id not in dropped]
    if len(dropped) > max_unanswered * len(job.prompts):
        raise ValueError(f"the judge gave no readable answer on {len(dropped)} of {len(job.prompts)} prompts, "
                         f"{', '.join(sorted(dropped)[:10])}; more than --max_unanswered {max_unanswered:g}. "
                         "Ask another judge, or read results/*/answers.jsonl")
    scoring = protocol.score(prompts, job.results, job.systems)
    columns = score_columns(scoring.groups, scoring.columns)
    judges = {system: parse(read_bytes(folder / JUDGE), str(folder / JUDGE))
              for system, folder in folders.items() if (folder / JUDGE).is_file()}
    if judges and len({json.dumps(judges.get(system), sort_keys=True) for system in job.systems}) > 1:
        raise ValueError(f"{job.results}: not one judge saw all of {', '.join(job.systems)}, asked in the same "
                         "way; run the command with --judge again until it ends")
    shares = {} if scoring.shares is None else {
        system: {prompt.id: float(value) for prompt, value in zip(prompts, values) if value == value}
        for system, values in zip(job.systems, scoring.shares)}
    table = {**job.identity(), "formula": protocol.formula, **as_json(columns, job.systems), "judges": judges,
             "unanswered": unanswered, "by_prompt": shares,
             "texts": {prompt.id: prompt.text for prompt in job.prompts}}
    write_json(job.out / SCORES, table)
    return table


def format_scores(table: Mapping[str, Any], *, is_percent: bool = False) -> str:
    """A line a column of the benchmark's table, a column a system, and what the last has over the first.

                     turn1                  turn2                  turn2 - turn1
        overall      0.79 [0.76, 0.82]      0.85 [0.82, 0.88]      +0.06 [+0.03, +0.09]
    """
    systems, difference = table["systems"], table.get("difference")
    names, told = list(systems), functools.partial(tell_score, is_percent=is_percent)
    rows = [["", *names] + ([f"{names[-1]} - {names[0]}"] if difference else [])]
    rows += [[column, *(told(systems[name][column]) for name in names)]
             + ([told(difference[column], is_difference=True)] if difference else [])
             for column in systems[names[0]]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    judges = {f"; judged by {judge.get('model')} with {judge.get('wording')}"
              for judge in table["judges"].values()}
    limited = " (a part of the benchmark: no score of it)" if table["limit"] else ""
    return "\n".join([*lines, "", f"{table['prompts']} prompts{limited} of {table['benchmark']} "
                      f"({table['version']}); {table['formula']}{''.join(judges)}; brackets: 95 % "
                      "intervals, bootstrap over prompts"])


def read_manifest(out: pathlib.Path) -> dict[str, Any]:
    """Raises: ValueError if the folder is not one of this command."""
    path = out / MANIFEST
    if not path.exists():
        raise ValueError(f"{str(out)!r} holds no drawn benchmark (no {MANIFEST}); give --config and "
                         "--checkpoint")
    manifest = parse(read_bytes(path), str(path))
    weights = manifest.get("checkpoint")
    is_ours = (isinstance(weights, dict) and {"path", "sha256"} <= set(weights)
               and isinstance(manifest.get("complete"), bool) and isinstance(manifest.get("seconds"), float)
               and isinstance(manifest.get("settings"), dict))
    if not is_ours:
        raise ValueError(f"{path}: is no manifest of a drawn benchmark; choose another --out")
    return manifest


def _compare(out: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise ValueError(f"{str(out)!r} holds another run (its {', '.join(differing)} differ); choose another "
                         "--out, or remove it")


def _read_list(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        names = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); judge again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: must be a list of prompts; judge again")
    return names
