"""Conversations in the released format: the six learning modes of IRGL, and the base model's modes.

A record is a list of turns. A user turn holds a string; an assistant turn holds a list of parts,
texts or images (base64 PNG), each saying whether it carries loss and how an image is looked at.
`*` marks what carries loss; a conditioning image enters as clean VAE latents and then ViT patches. The learning
modes are put together by `curation.compose`, from what renderer and detector give (`crew.py`).

    initial_thinking_understanding    system, prompt, image, question, think1*
    initial_thinking_generation       system, prompt, think1*
    initial_full                      system, prompt, think1*, image1*
    improving_thinking_understanding  system, prompt, image1, image2, question, think2*
    improving_thinking_generation     system, prompt, think1, image1, think2*
    improving_full                    system, prompt, think1, image1, think2*, image2*

    text_to_image                     prompt, image*
    understanding                     image (ViT only), (question, answer*) x 3
    description                       system, prompt, describe*, image*
    editing                           [prompt, [caption,]] image1, instruction [and caption], image2*
    captioned                         caption, image*
    captioning                        image (ViT only), question, caption*
    reading                           caption, (question, answer*) x 3
    naming                            system, prompt, describe*; both in other words
    mending                           as editing, image1 being the model's own
    medley                            as captioned, every thing of a shape of its own
    verifying                         image (ViT only), question, yes or no*
    reviewing                         as verifying, the image being the model's own
    comparing                         caption, question, yes or no*; half in other words
    rephrasing                        prompt, question, the same in plain words*; half in other words
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.curation.compose import INITIAL, MODES, Turn, assistant, image_part, text, user
from data_pipelines.curation.gathering import Crew, Gathered, Plan, gather, tell
from data_pipelines.curation.material import Picture, Round
from data_pipelines.shapes import language, reflections
from data_pipelines.shapes.crew import LICENCE, RULES, WORDS, ShapesCase, ShapesCrew
from data_pipelines.shapes.drafts import Draft, SeenDraft
from data_pipelines.shapes.edits import Edit, edit_draft, make_edit
from data_pipelines.shapes.flaws import Flaw, make_flawed
from data_pipelines.shapes.reading import NUM_QUESTIONS, name_things, read_caption, vary
from data_pipelines.shapes.render import render
from data_pipelines.shapes.repair import repair, repair_draft
from data_pipelines.shapes.sample import pick, sample_medley, sample_request, sample_scene
from data_pipelines.shapes.scene import CATEGORIES, Request, Scene
from data_pipelines.shapes.sketch import sketch

BASE_MODES = ("text_to_image", "understanding", "description", "editing", "captioned", "captioning", "reading",
              "naming", "mending", "medley", "verifying", "reviewing", "comparing", "rephrasing")

# A model that only ever saw flaws would find one in every picture and spoil the good ones.
FLAWLESS_SHARE = 0.25
SOURCE = {"file": "shapes"}   # of prompts
# Of the pictures that the base is shown: drawn crookedly, as it draws itself.
SKETCHED_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Story:
    """All that one record is told from; without flaws `flawed` is the right scene itself."""

    request: Request
    prompt: str
    right: Scene
    flawed: Scene
    flaws: tuple[Flaw, ...]


def record(
    mode: str, rng: np.random.Generator, *, split: str = "train", side: int = 64, draft: SeenDraft | None = None
) -> list[Turn]:
    """One conversation of the mode, ready for `json.dumps`.

    With a `draft` an improving mode, mending and reviewing start from it; else the first picture is rendered,
    with a flaw.

    Raises ValueError for a mode that is neither in MODES nor in BASE_MODES, or an unknown split.
    """
    if mode not in MODES + BASE_MODES:
        raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES + BASE_MODES)}")
    if mode in MODES:
        row = tell(gather_one(mode, rng, split=split, side=side, draft=draft), mode)
        assert row, "the miniature's own texts pass its filters"
        return row.conversation
    if mode in ("mending", "reviewing"):
        draft = draft or _flawed_draft(rng, split, side)
        return (_mending_turns if mode == "mending" else _reviewed_turns)(rng, draft, side)
    return _base_record(mode, rng, _sample_story(rng, split), split, side)


def gather_one(mode: str, rng: np.random.Generator, *, split: str, side: int, draft: SeenDraft | None = None,
               id_: str = "") -> Gathered:
    """What a record of a learning mode is told from, made as `data_pipelines.curate` makes it."""
    if mode in INITIAL:
        story = _sample_story(rng, split)
        case = ShapesCase(id_, story.prompt, LICENCE, SOURCE, request=story.request, rng=rng, right=story.right)
    else:
        drawn = draft or _flawed_draft(rng, split, side)
        mended = repair_draft(drawn)
        first = Round(drawn.draft.thought, Picture.drawn(drawn.draft.image),
                      {"by": "irg_jax.draft" if draft else "shapes renderer"})
        case = ShapesCase(id_, drawn.draft.prompt, LICENCE, SOURCE, request=drawn.draft.request, rng=rng,
                          right=mended.right, first=first, mended=mended)
    return gather(case, crew=_crew(side), plan=Plan((mode,), WORDS, RULES))


@functools.cache
def _crew(side: int) -> Crew:
    one = ShapesCrew(side)
    return Crew(critic=one, painter=one, sketcher=one)


def generator(seed: int, mode: str, index: int | str) -> np.random.Generator:
    """The random numbers of record `index` of a mode: the same on every machine, in any order."""
    digest = hashlib.sha256(f"shapes/{seed}/{mode}/{index}".encode()).digest()
    return np.random.default_rng(np.random.SeedSequence(int.from_bytes(digest[:16], "big")))


def heldout_prompts(num: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`num` test prompts, the six categories in turn, no two with the same request.

    Each is {"id", "category", "prompt", "request"}; `Request.from_json` reads the last.
    Raises ValueError if there are not so many different requests.
    """
    prompts, seen = [], set()
    for index in range(num):
        rng = generator(seed, "heldout", index)
        category = CATEGORIES[index % len(CATEGORIES)]
        for _ in range(1000):
            request = sample_request(rng, split="heldout", category=category)
            if (key := json.dumps(request.to_json())) not in seen:
                break
        else:
            raise ValueError(f"num is {num}: there are only {index // len(CATEGORIES)} held-out "
                             f"requests of category {category}, choose a smaller number")
        seen.add(key)
        prompts.append({"id": f"{index:05d}", "category": category,
                        "prompt": language.prompt(rng, request), "request": request.to_json()})
    return prompts


def _sample_story(rng: np.random.Generator, split: str) -> Story:
    request = sample_request(rng, split=split)
    right = sample_scene(rng, request, split=split)
    flawed, flaws = right, ()
    if rng.random() >= FLAWLESS_SHARE:
        flawed, flaw = make_flawed(rng, request, right, split=split)
        flaws = (flaw,)
    return Story(request, language.prompt(rng, request), right, flawed, flaws)


def _flawed_draft(rng: np.random.Generator, split: str, side: int) -> SeenDraft:
    """A stand-in for a draft: rendered, with one flaw or none."""
    story = _sample_story(rng, split)
    plan = language.plan(rng, story.right, story.request.relation)
    draft = Draft(story.prompt, story.request, plan, story.right, render(story.flawed, side=side))
    return SeenDraft(draft, story.flawed.things, story.flawed.background)


def _base_record(mode: str, rng: np.random.Generator, story: Story, split: str, side: int) -> list[Turn]:
    match mode:
        case "text_to_image":
            return [user(story.prompt), assistant(_drawn(story.right, side))]
        case "understanding":
            asked = language.questions(rng, story.flawed, NUM_QUESTIONS)
            image = _image(story.flawed, side, shown(rng, story.flawed, side), need_vit=True)
            return [assistant(image), *_answered(asked)]
        case "description":
            thought = text(language.think(rng, story.right))
            return [user(language.SYSTEM_PROMPT), user(story.prompt),
                    assistant(thought, _drawn(story.right, side))]
        case "editing":
            return _edit_turns(rng, story, side)
        case "captioned":
            return _captioned_turns(rng, story.right, side)
        case "medley":
            return _captioned_turns(rng, sample_medley(rng), side)
        case "captioning":
            image = _image(story.flawed, side, shown(rng, story.flawed, side), need_vit=True)
            return [assistant(image), user(language.WHAT_IS_WHERE),
                    assistant(text(language.caption(None, story.flawed)))]
        case "reading":
            told, asked = read_caption(rng, story.right)
            return [user(told), *_answered(asked)]
        case "verifying" | "comparing":
            return _compared_turns(mode, rng, story, split, side)
        case "rephrasing":
            asked, plain = vary(rng, (story.prompt, language.plainly(story.request)))
            return [user(asked), user(language.SAY_PLAINLY), assistant(text(plain))]
        case "naming":
            prompt, thought = name_things(rng, story.prompt, story.right)
            return [user(language.SYSTEM_PROMPT), user(prompt), assistant(text(thought))]
    raise AssertionError(mode)


def _captioned_turns(rng: np.random.Generator, scene: Scene, side: int) -> list[Turn]:
    return [user(language.caption(rng, scene)), assistant(_drawn(scene, side))]


def _compared_turns(mode: str, rng: np.random.Generator, story: Story, split: str, side: int) -> list[Turn]:
    """A scene that is right, flawed, or for another prompt: where little is wrong, one learns to say yes."""
    other = sample_scene(rng, sample_request(rng, split=split, category=story.request.category), split=split)
    scene = pick(rng, (story.right, story.flawed, other))
    flaws = repair(story.request, story.right, scene.things, scene.background).flaws
    doubt = reflections.doubt(rng, story.request, flaws, scene, story.right)
    if mode == "verifying":
        return _verified_turns(scene, shown(rng, scene, side), side, doubt)
    told, question, answer = vary(rng, (language.caption(rng, scene), *doubt))
    return [user(told), *_answered([(question, answer)])]


def _reviewed_turns(rng: np.random.Generator, seen: SeenDraft, side: int) -> list[Turn]:
    repaired, request = repair_draft(seen), seen.draft.request
    doubt = reflections.doubt(rng, request, repaired.flaws, repaired.draft, repaired.right)
    return _verified_turns(repaired.draft, seen.draft.image, side, doubt)


def _verified_turns(scene: Scene, picture: np.ndarray, side: int, doubt: tuple[str, str]) -> list[Turn]:
    return [assistant(_image(scene, side, picture, need_vit=True)), *_answered([doubt])]


def _edit_turns(rng: np.random.Generator, story: Story, side: int) -> list[Turn]:
    edit = make_edit(rng, story.request, story.prompt, right=story.right, flawed=story.flawed,
                     flaws=story.flaws)
    return _tell(edit, shown(rng, edit.first, side), side)


def _mending_turns(rng: np.random.Generator, seen: SeenDraft, side: int) -> list[Turn]:
    """As `_edit_turns`, of a picture that the model drew itself."""
    draft = seen.draft
    edit = edit_draft(rng, draft.request, draft.prompt, repair_draft(seen))
    return _tell(edit, draft.image, side)


def _tell(edit: Edit, picture: np.ndarray, side: int) -> list[Turn]:
    unchanged = picture if edit.right == edit.first else None
    return [*map(user, edit.said), assistant(_seen(edit.first, side, picture)), user(edit.instruction),
            assistant(_drawn(edit.right, side, unchanged))]


def shown(rng: np.random.Generator, scene: Scene, side: int) -> np.ndarray:
    """A picture of the scene for the base to look at, uint8 [side, side, 3]."""
    picture = render(scene, side=side)
    return sketch(rng, picture) if rng.random() < SKETCHED_SHARE else picture


def _answered(asked: Sequence[tuple[str, str]]) -> list[Turn]:
    return [turn for question, answer in asked for turn in (user(question), assistant(text(answer)))]


def _seen(scene: Scene, side: int, picture: np.ndarray | None = None) -> dict[str, Any]:
    """A conditioning image: the scene's `picture`, rendered if there is none."""
    return _image(scene, side, picture, need_vae=True, need_vit=True)


def _drawn(scene: Scene, side: int, picture: np.ndarray | None = None) -> dict[str, Any]:
    """An image to be generated; `picture` as of `_seen`."""
    return _image(scene, side, picture, need_loss=True)


def _image(scene: Scene, side: int, picture: np.ndarray | None = None, *, need_loss: bool = False,
           need_vae: bool = False, need_vit: bool = False) -> dict[str, Any]:
    pixels = render(scene, side=side) if picture is None else picture
    return image_part(Picture.drawn(pixels), need_loss=need_loss, need_vae=need_vae, need_vit=need_vit)
