"""Drafts: pictures that the base model drew for training prompts, the first images of improving records.

    DIR/0000.parquet ...   columns prompt, request, thought, wanted, image (PNG); by `irg_jax.draft`
    DIR/manifest.json      which model drew them and how, sha256 of every file; written last

Each was drawn after a thought, which is the first thought of the record. Some thoughts miss the request in
one point, as a model's own do: who learnt from right ones alone would hold the picture against the thought,
never against the prompt.

The critic (the detector) says what each shows, and a painter (`repair`) what it should have shown. Drafts that
show a held-out combination are left out and counted: no training picture may.
"""

import io
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from tqdm import tqdm

from data_pipelines.digests import MANIFEST, file_sha256, write_json
from data_pipelines.images import decode_image
from data_pipelines.shapes import language
from data_pipelines.shapes.detect import Detection, detect_background, survey
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import Request, Scene
from data_pipelines.shapes.split import is_training

SCHEMA = pyarrow.schema([("prompt", pyarrow.string()), ("request", pyarrow.string()),
                         ("thought", pyarrow.string()), ("wanted", pyarrow.string()),
                         ("image", pyarrow.binary())])
MISTHOUGHT_SHARE = 0.15
PER_FILE = 500
MAX_PIXELS = 2**20


class Draft(NamedTuple):
    """A training prompt, a thought in tags, a scene that would do, and what the base drew: uint8 [H, W, 3]."""

    prompt: str
    request: Request
    thought: str
    wanted: Scene
    image: np.ndarray


class SeenDraft(NamedTuple):
    """A draft and what the detector saw in it; blobs are regions that it could not name."""

    draft: Draft
    things: tuple[Detection, ...]
    background: str
    num_blobs: int = 0


class Order(NamedTuple):
    """As a `Draft`, before it is drawn."""

    prompt: str
    request: Request
    thought: str
    wanted: Scene


def order_draft(rng: np.random.Generator, *, is_planned: bool = True) -> Order:
    """One order, drawn at random; its thought is a plan, or one of the base's own kind."""
    request = sample_request(rng, split="train")
    thought = wanted = sample_scene(rng, request, split="train")
    if rng.random() < MISTHOUGHT_SHARE:
        thought, _ = make_flawed(rng, request, wanted, split="train")
    prompt = language.prompt(rng, request)
    text = language.plan(rng, thought, request.relation) if is_planned else language.think(rng, thought)
    return Order(prompt, request, text, wanted)


def write_part(path: pathlib.Path, drafts: Iterable[Draft]) -> None:
    """One parquet file, whole or absent."""
    to_json = lambda part: json.dumps(part.to_json(), sort_keys=True)
    rows = [{"prompt": draft.prompt, "request": to_json(draft.request), "thought": draft.thought,
             "wanted": to_json(draft.wanted), "image": _to_png(draft.image)} for draft in drafts]
    temporary = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), temporary,
                                write_page_checksum=True)
    temporary.replace(path)


def finish(folder: pathlib.Path, **fields: Any) -> None:
    """Writes the manifest, which makes the folder usable."""
    files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.parquet"))}
    write_json(folder / MANIFEST, {**fields, "files": files})


def describe_drafts(folder: str | pathlib.Path) -> dict[str, Any]:
    """The manifest. Raises: ValueError if the folder holds no finished drafts."""
    try:
        manifest = json.loads(pathlib.Path(folder, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no finished drafts ({error}); run python -m irg_jax.draft") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise ValueError(f"{pathlib.Path(folder, MANIFEST)} names no files; run python -m irg_jax.draft again")
    return manifest


def read_drafts(folder: str | pathlib.Path) -> list[Draft]:
    """All drafts of a folder, in order.

    Raises: ValueError naming file and row of what is missing, changed or broken.
    """
    drafts = []
    for name, digest in sorted(describe_drafts(folder)["files"].items()):
        path = pathlib.Path(folder, pathlib.PurePath(name).name)
        if not path.is_file() or file_sha256(path) != digest:
            raise ValueError(f"{path} is not the file that the manifest names; draw the drafts again")
        for row, values in enumerate(pyarrow.parquet.read_table(path, schema=SCHEMA).to_pylist()):
            place = f"{path} row {row}"
            try:
                request = Request.from_json(json.loads(values["request"]))
                wanted = Scene.from_json(json.loads(values["wanted"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from error
            if not (values["prompt"] and values["thought"]):
                raise ValueError(f"{place}: a prompt or a thought is missing; draw the drafts again")
            if judge(request, wanted.things, wanted.background) or not is_training(wanted):
                raise ValueError(f"{place}: the scene that is wanted does not fulfil the request, or shows "
                                 "what is held out; draw the drafts again")
            image = decode_image(values["image"] or b"", where=place, max_pixels=MAX_PIXELS)
            drafts.append(Draft(values["prompt"], request, values["thought"], wanted, image))
    return drafts


def look_at(drafts: Sequence[Draft]) -> list[SeenDraft]:
    """What the detector sees in each, without those that show a held-out combination."""
    seen = []
    for draft in tqdm(drafts, "critic", unit="draft", disable=None):
        things, num_blobs = survey(draft.image)
        seen.append(SeenDraft(draft, tuple(things), detect_background(draft.image), num_blobs))
    return [one for one in seen if is_training(Scene(one.draft.request.category, one.things, one.background))]


def _to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
