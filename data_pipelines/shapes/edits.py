"""Pictures to be edited, and what a user says before and after: how the base learns to keep, change and redraw.

What was said before the picture may be wrong about it, and may tell what is wanted already, as a plan would.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.shapes import language, reflections
from data_pipelines.shapes.flaws import Flaw, Repair, make_flawed
from data_pipelines.shapes.sample import sample_scene
from data_pipelines.shapes.scene import Request, Scene, is_free
from data_pipelines.shapes.split import is_training

REDRAWN_SHARE = 0.45   # of the edits that change something
CROWDED_SHARE = 0.6    # of the pictures to be cleared: things of two scenes, which run into each other
TOLD_SHARE = 0.6       # of the changes: all that is wanted is told after the instruction
KEPT_SHARE = 0.5       # of the model's own right pictures


@dataclasses.dataclass(frozen=True)
class Edit:
    """What is said before, the picture that is shown, and the instruction that leads to the right one."""

    said: tuple[str, ...]
    first: Scene
    instruction: str
    right: Scene


def make_edit(rng: np.random.Generator, request: Request, prompt: str, *, right: Scene, flawed: Scene,
              flaws: Sequence[Flaw]) -> Edit:
    """The way to the right scene from a flawed or a crowded one; from itself if there are no flaws."""
    if not flaws:
        said = _before(rng, prompt, right, sample_scene(rng, request, split="train"))
        final = f" {language.ask(None, request)}." if rng.random() < 0.5 else ""
        keep = reflections.instruct(rng, request, flaws=(), flawed=right, right=right)
        return Edit(said, right, keep + final, right)
    wanted = language.caption(rng, right)
    if rng.random() < REDRAWN_SHARE:
        first = crowd(rng, request)
        return Edit(_before(rng, prompt, right, first), first, f"{reflections.REDRAW}. {wanted}", right)
    instruction = reflections.instruct(rng, request, flaws=flaws, flawed=flawed, right=right)
    if rng.random() < TOLD_SHARE:
        instruction += f" {wanted}"
    return Edit(_before(rng, prompt, right, flawed), flawed, instruction, right)


def edit_draft(rng: np.random.Generator, request: Request, prompt: str, drawn: Repair) -> Edit:
    """How to mend a picture that the model drew itself; a right one is kept, or changed in one way."""
    if drawn.flaws:
        step = reflections.instruct(rng, request, flaws=drawn.flaws, flawed=drawn.draft, right=drawn.right)
        return Edit(_before(rng, prompt, drawn.right, drawn.draft), drawn.draft,
                    f"{step} {language.caption(rng, drawn.right)}", drawn.right)
    things = drawn.right.things
    has_room = all(is_free(thing, things[:i]) for i, thing in enumerate(things))
    # One of two green diamonds may be another thing, and "a green diamond" is still there.
    has_more = len(things) > request.num_things
    if has_more or not has_room or rng.random() < KEPT_SHARE:
        return make_edit(rng, request, prompt, right=drawn.right, flawed=drawn.right, flaws=())
    changed, flaw = make_flawed(rng, request, drawn.right, split="train")
    back = {"missing": "extra", "extra": "missing"}
    change = Flaw(back.get(flaw.kind, flaw.kind), flaw.wanted, flaw.seen)
    step = reflections.instruct(rng, request, flaws=(change,), flawed=drawn.right, right=changed)
    return Edit(_before(rng, prompt, changed, drawn.right), drawn.draft,
                f"{step} {language.caption(rng, changed)}", changed)


def crowd(rng: np.random.Generator, request: Request) -> Scene:
    """Another scene for the request, most with a second one drawn over it."""
    scene = sample_scene(rng, request, split="train")
    if rng.random() < CROWDED_SHARE:
        over = sample_scene(rng, request, split="train")
        both = dataclasses.replace(scene, things=scene.things + over.things)
        return both if is_training(both) else scene
    return scene


def _before(rng: np.random.Generator, prompt: str, right: Scene, other: Scene) -> tuple[str, ...]:
    match rng.integers(4):
        case 0:
            return ()
        case 1:
            return (prompt,)
        case 2:
            return prompt, language.caption(rng, right)
    return prompt, language.caption(rng, other)
