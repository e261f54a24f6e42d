r"""Draws prompts with a trained model.

    python -m irg_jax.generate --config configs/shapes_generate.py --checkpoint runs/shapes/stage2 \
        --prompt "two red circles left of a blue square" --out runs/shapes/generated

OUT/0000/turn1.txt, turn1.png, turn2.txt, ...   what each turn thought and drew
OUT/0000/trajectory.png                         all of it in one picture
OUT/0000/prompt.json                            prompt, seed, checkpoint and settings

One folder a prompt, which takes its name when it is whole: after an interruption the same command
draws only what is missing. `--config.text.temperature=0.5` overrides a field.
"""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from absl import flags
from PIL import Image
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.evaluation.drawing import compose_trajectory
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import describe_settings, in_batches, load_generator
from irg_jax.sampling.trajectory import Generator, Turn

REQUEST = "prompt.json"
SHOWN_SIDE = 256         # small images are enlarged to about this in the composed picture


def generate(prompts: Sequence[str], *, generator: Generator, seed: int, num_turns: int,
             batch_size: int, checkpoint: dict[str, str], out: str | pathlib.Path) -> int:
    """Draws every prompt that has no folder in `out` yet; returns how many that were.

    All prompts have the same seed, so what is drawn for one depends on no other.

    Raises: ValueError if `out` holds anything else than parts of this very run.
    """
    out = pathlib.Path(out)
    settings = describe_settings(generator.config)
    requests = {}
    for number, prompt in enumerate(prompts):
        request = {"prompt": prompt, "seed": seed, "num_turns": num_turns, "checkpoint": checkpoint,
                   "settings": settings}
        if not _is_drawn(out / f"{number:04d}", request):
            requests[out / f"{number:04d}"] = request
    progress = tqdm(total=len(prompts), initial=len(prompts) - len(requests), unit="prompt",
                    disable=None)
    for batch, padded in in_batches(list(requests.items()), min(batch_size, max(1, len(requests)))):
        drawn = generator.trajectories([request["prompt"] for _, request in padded],
                                       seeds=[seed] * len(padded), num_turns=num_turns)
        for (folder, request), turns in zip(batch, drawn):
            _write(folder, request, turns)
            progress.update()
    progress.close()
    return len(requests)


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """One prompt a line, or the field "prompt" of each line of a .jsonl; empty lines do not count.

    Raises: ValueError naming file and line.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if str(path).endswith(".jsonl"):
        prompts = [_read_line(line, f"{path}, line {number}") for number, line in numbered]
    else:
        prompts = [line.strip() for _, line in numbered]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def _read_line(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: lacks the field 'prompt' with a text")
    return prompt


def _is_drawn(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} is not a folder of this command ({error}); choose "
                         "another --out") from error
    differing = [key for key in request if not isinstance(found, dict) or found.get(key) != request[key]]
    if differing:
        raise ValueError(f"{str(folder)!r} holds another drawing (its {', '.join(differing)} "
                         "differ); choose another --out, or remove it")
    return True


def _write(folder: pathlib.Path, request: dict[str, Any], turns: Sequence[Turn]) -> None:
    """All files of a prompt, in a folder that takes its name at the end."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, turn in enumerate(turns, 1):
        (partial / f"turn{number}.txt").write_text(turn.text + "\n", encoding="utf-8")
        Image.fromarray(turn.image).save(partial / f"turn{number}.png")
    scale = max(1, SHOWN_SIDE // max(turns[0].image.shape[:2]))
    picture = compose_trajectory(request["prompt"], [(turn.text, turn.image) for turn in turns],
                                 scale=scale)
    picture.save(partial / "trajectory.png")
    (partial / REQUEST).write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


def main(values: Any) -> None:
    if bool(values.prompt) == bool(values.prompts):
        raise ValueError("give either --prompt or --prompts")
    config = from_config_dict(SamplingConfig, values.config)
    if any(not prompt.strip() for prompt in values.prompt or ()):
        raise ValueError("--prompt is empty; say what to draw")
    prompts = values.prompt or read_prompts(values.prompts)
    generator, checkpoint = load_generator(
        values.checkpoint, config,
        prompts={f"prompt {number}": prompt for number, prompt in enumerate(prompts, 1)})
    count = generate(prompts, generator=generator, seed=values.seed,
                     num_turns=values.num_turns or config.num_turns,
                     batch_size=values.batch or config.batch_size, checkpoint=checkpoint,
                     out=values.out)
    print(f"drew {count} of {len(prompts)} prompts into {values.out}"
          + ("" if count == len(prompts) else "; the rest was there"))


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "A model checkpoint, or the folder of a trained stage.")
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times.")
    flags.DEFINE_string("prompts", None, "A file with a prompt a line, or .jsonl with \"prompt\".")
    flags.DEFINE_string("out", None, "Folder of the drawings.")
    flags.DEFINE_integer("seed", 0, "Of texts and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("num_turns", None, "Images a prompt; by default the config's.",
                         lower_bound=1)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.",
                         lower_bound=1)
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
