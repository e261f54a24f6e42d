"""Draws prompts into folders, one a prompt, and reads what is to be drawn from files.

    OUT/0000/turn1.txt, turn1.png, turn2.txt, ...   what each turn thought and drew
    OUT/0000/trajectory.png                         all of it in one picture
    OUT/0000/prompt.json                            prompt, seed, checkpoint and settings

A folder takes its name when it is whole; what is there is not written again.
"""

import collections
import hashlib
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from data_pipelines.images import read_image
from irg_jax.evaluation.drawing import compose_trajectory
from irg_jax.evaluation.files import parse, read_bytes
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.opening import describe_settings, in_batches
from irg_jax.sampling.trajectory import Generator, Given, Turn

REQUEST = "prompt.json"
SEEDS = 2**32
SHOWN_SIDE = 256         # small images are enlarged to about this in the composed picture


class Pace(NamedTuple):
    """How many prompts were drawn, and how fast: the first batch compiles what all batches run."""

    drawn: int
    first_seconds: float | None = None    # until the first result
    seconds: float | None = None          # a prompt from then on, if there were more batches

    def __str__(self) -> str:
        if self.first_seconds is None:
            return ""
        later = "" if self.seconds is None else f", then one every {self.seconds:.3g} s"
        return f"; the first after {self.first_seconds:.3g} s{later}"


class Order(NamedTuple):
    """What is to be drawn; without a seed the command's counts."""

    prompt: str
    seed: int | None = None
    given: Given = Given()

    def request(self, seed: int) -> dict[str, Any]:
        """What decides how it comes out, as JSON."""
        request: dict[str, Any] = {"prompt": self.prompt, "seed": seed if self.seed is None else self.seed}
        texts, image = self.given.texts, self.given.image
        if texts:
            request["texts"] = list(texts)
        if image is not None:
            request["image"] = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        return request


def generate(orders: Sequence[Order], *, generator: Generator, seed: int, num_turns: int, batch_size: int,
             checkpoint: dict[str, str], out: str | pathlib.Path) -> Pace:
    """Draws every prompt that has no folder in `out` yet.

    Batches are of all orders, whatever is there, and one that lacks a folder is drawn whole. For what is drawn
    for a prompt depends on its batch by rounding: texts are padded to the longest one.

    Without turns each is drawn plainly, with no system prompt and no thought, as turn 1.

    Raises: ValueError if a prompt's folder in `out` holds another drawing, or there are more texts than turns.
    """
    out, start, first = pathlib.Path(out), time.perf_counter(), None
    common = {"num_turns": num_turns, "checkpoint": checkpoint, "settings": describe_settings(generator.config)}
    groups = collections.defaultdict(list)    # a batch looks at images of one size
    missing = set()
    for number, order in enumerate(orders):
        if len(order.given.texts) > num_turns:
            raise ValueError(f"prompt {number + 1} brings {len(order.given.texts)} texts for {num_turns} "
                             "turns; leave some out, or give --num_turns")
        folder, request = out / f"{number:04d}", order.request(seed) | common
        groups[generator.sizes_seen(order.given.image)].append((folder, request, order.given))
        if not _is_drawn(folder, request):
            missing.add(folder)
    out.mkdir(parents=True, exist_ok=True)    # rather refused now than after the first batch
    progress = tqdm(total=len(orders), initial=len(orders) - len(missing), unit="prompt", disable=None)
    size = generator.fit_batch(min(batch_size, len(orders)))
    batches = itertools.chain.from_iterable(in_batches(group, size) for group in groups.values())
    for batch, padded in batches:
        lacking = {folder for folder, *_ in batch} & missing
        if not lacking:
            continue
        prompts, seeds = ([request[name] for _, request, _ in padded] for name in ("prompt", "seed"))
        if num_turns:
            drawn = trajectories(generator, prompts, seeds=seeds, num_turns=num_turns,
                                 given=[given for _, _, given in padded])
        else:
            drawn = [(turn,) for turn in generator.text_to_image(prompts, seeds=seeds)]
        for (folder, request, _), turns in zip(batch, drawn):
            if folder in lacking:
                _write(folder, request, turns)
                progress.update()
        first = first or (len(lacking), time.perf_counter() - start)
    progress.close()
    if first is None:
        return Pace(0)
    rest = len(missing) - first[0]
    return Pace(len(missing), first[1], (time.perf_counter() - start - first[1]) / rest if rest else None)


def read_orders(path: str | pathlib.Path) -> list[Order]:
    """One prompt a line, or the fields of `Order` and `Given` a line of a .jsonl; empty lines do not count.

    Raises: ValueError naming file and line.
    """
    try:
        with pathlib.Path(path).open(encoding="utf-8-sig") as file:
            lines = list(file)    # ends of lines alone: `splitlines` has others, which JSON allows in a text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the prompts cannot be read ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if str(path).endswith(".jsonl"):
        orders = [_read_line(line, f"{path}, line {number}", pathlib.Path(path).parent)
                  for number, line in numbered]
    else:
        orders = [Order(line.strip()) for _, line in numbered]
    if not orders:
        raise ValueError(f"{path}: holds no prompt")
    return orders


def _read_line(line: str, place: str, folder: pathlib.Path) -> Order:
    record = parse(line.encode(), place)
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: lacks the field 'prompt' with a text")
    seed = record.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < SEEDS):
        raise ValueError(f"{place}: field 'seed' is {seed!r}; it is an integer from 0 to {SEEDS - 1}")
    texts, image = record.get("texts") or [], record.get("image")
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: field 'texts' is {texts!r}; it is a list of texts, and of null for the "
                         "model's own")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{place}: field 'image' is {image!r}; it is an image's path from the file's folder")
    return Order(prompt, seed, Given(tuple(texts), None if image is None else read_image(folder / image)))


def _is_drawn(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    try:
        found = parse(read_bytes(folder / REQUEST), str(folder / REQUEST))
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} is not a folder of this command ({error}); choose "
                         "another --out") from error
    match found.get("checkpoint"):
        case {"sha256": sha256} if sha256 == request["checkpoint"]["sha256"]:
            found["checkpoint"] = request["checkpoint"]    # the same weights, from wherever
    differing = [key for key in found | request if found.get(key) != request.get(key)]
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
