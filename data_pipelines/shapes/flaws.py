"""A first picture that went wrong: one thing is changed, so that the request is not fulfilled."""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.sample import draw_size, pick, place
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Request, Scene, Thing, is_free
from data_pipelines.shapes.split import is_training

MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Flaw:
    """What went wrong: `seen` is only in the flawed picture, `wanted` only in the right one.

    kind: "missing" (nothing seen), "extra" (nothing wanted), "shape", "colour", "size", "texture",
    "moved" (one each), "place" (two each, which have changed places), "background" (neither), or "blob" (all
    things wanted: what is there is no thing, and all is drawn afresh).
    """

    kind: str
    seen: tuple[Thing, ...] = ()
    wanted: tuple[Thing, ...] = ()


@dataclasses.dataclass(frozen=True)
class Repair:
    """A first picture as it was seen, the scene it should have been, and what lies between them.

    Without flaws the first picture fulfils the request, and `right` is the same scene.
    """

    draft: Scene
    right: Scene
    flaws: tuple[Flaw, ...]


def make_flawed(
    rng: np.random.Generator, request: Request, scene: Scene, *, split: str
) -> tuple[Scene, Flaw]:
    """The scene with one flaw, all else as it was; for training, without held-out combinations."""
    changes = _changes(request)
    for _ in range(MAX_DRAWS):
        flawed, flaw = pick(rng, changes)(rng, scene)
        if (flawed and judge(request, flawed.things, flawed.background)
                and (split == "heldout" or is_training(flawed))):
            return flawed, flaw
    raise RuntimeError(f"no {split} flaw for {request} in {MAX_DRAWS} draws")


Change = Callable[[np.random.Generator, Scene], tuple[Scene | None, Flaw]]


def _changes(request: Request) -> tuple[Change, ...]:
    """The ways in which a picture can miss this request, likelier ones more than once."""
    groups = request.groups
    changes: list[Change] = [_change_shape]
    if any(group.colour for group in groups):
        changes += [_change_colour] * 3
    if any(group.size for group in groups):
        changes += [_change_size]
    if any(group.texture for group in groups):
        changes += [_change_texture]
    if request.num_things > 1:
        changes += [_drop]
    if len(groups) > 1:
        changes += [_repeat_shape] * 2
    if request.category == "counting":
        changes += [_drop, _add, _add]
    if request.relation:
        changes += [_swap] * 6
    if request.background:
        changes += [_change_background]
    return tuple(changes)


def _change_shape(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    return _replace_one(rng, scene, "shape", lambda thing: pick(rng, _others(SHAPES, thing.shape)))


def _repeat_shape(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    """Two of a kind where two kinds were asked for, as plans of two objects go wrong."""
    return _replace_one(rng, scene, "shape",
                        lambda thing: pick(rng, _others(tuple(one.shape for one in scene.things), thing.shape)))


def _change_colour(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    return _replace_one(
        rng, scene, "colour", lambda thing: pick(rng, _others(COLOURS, thing.colour)))


def _change_texture(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    return _replace_one(rng, scene, "texture",
                        lambda thing: "plain" if thing.texture == "striped" else "striped")


def _change_size(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    return _replace_one(rng, scene, "size", lambda thing: draw_size(
        rng, "small" if thing.size > 0.33 else "large", num_things=1))


def _replace_one(rng: np.random.Generator, scene: Scene, field: str,
                 choose: Callable) -> tuple[Scene | None, Flaw]:
    index = rng.integers(len(scene.things))
    wanted = scene.things[index]
    seen = dataclasses.replace(wanted, **{field: choose(wanted)})
    others = scene.things[:index] + scene.things[index + 1:]
    things = (*scene.things[:index], seen, *scene.things[index + 1:])
    return _with(scene, things if is_free(seen, others) else None), Flaw(field, (seen,), (wanted,))


def _drop(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    num_missing = 2 if len(scene.things) > 2 and rng.random() < 0.3 else 1
    missing = rng.permutation(len(scene.things))[:num_missing].tolist()
    rest = tuple(thing for i, thing in enumerate(scene.things) if i not in missing)
    return _with(scene, rest), Flaw("missing", wanted=tuple(scene.things[i] for i in missing))


def _add(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    num_extra = 2 if len(scene.things) == 2 and rng.random() < 0.3 else 1
    extra: list[Thing] = []
    for _ in range(num_extra):
        size = draw_size(rng, "small", num_things=len(scene.things))
        thing = dataclasses.replace(pick(rng, scene.things), size=size)
        thing = place(rng, thing, among=(*scene.things, *extra))
        if thing is None:
            return None, Flaw("extra")
        extra.append(thing)
    return _with(scene, (*scene.things, *extra)), Flaw("extra", seen=tuple(extra))


def _swap(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    one, other = scene.things[0], scene.things[-1]
    seen = (dataclasses.replace(one, x=other.x, y=other.y),
            dataclasses.replace(other, x=one.x, y=one.y))
    things = (seen[0], *scene.things[1:-1], seen[1])
    fits = all(is_free(thing, things[:i]) for i, thing in enumerate(things))
    return _with(scene, things if fits else None), Flaw("place", seen, (one, other))


def _change_background(rng: np.random.Generator, scene: Scene) -> tuple[Scene | None, Flaw]:
    background = pick(rng, _others(BACKGROUNDS, scene.background))
    return dataclasses.replace(scene, background=background), Flaw("background")


def _with(scene: Scene, things: tuple[Thing, ...] | None) -> Scene | None:
    return things and dataclasses.replace(scene, things=things)


def _others(choices: tuple[str, ...], one: str) -> tuple[str, ...]:
    return tuple(choice for choice in choices if choice != one)
