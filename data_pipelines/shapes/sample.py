"""Requests and scenes drawn at random, inside one side of the held-out split."""

import dataclasses

import numpy as np

from data_pipelines.shapes.scene import (
    BACKGROUNDS,
    BORDER,
    CATEGORIES,
    COLOURS,
    COUNTS,
    DRAWN_SIZES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Request,
    Scene,
    Thing,
    holds_clearly,
    is_free,
)
from data_pipelines.shapes.split import combinations, held_out_keys, is_held_out, is_training

SPLITS = ("train", "heldout")
MIXED_SHARE = 0.25   # of training requests for counting and position: they also name colours
PLACES_TRIED = 30
MAX_DRAWS = 10_000   # far above what the rarest request needs; reaching it is a bug


def sample_request(
    rng: np.random.Generator, *, split: str, category: str | None = None
) -> Request:
    """A request of one category (drawn evenly if None) that belongs to the split.

    Training requests also mix categories ("two red circles left of a blue square"), held-out ones
    keep to the six plain forms. Raises ValueError for an unknown split or category.
    """
    _check_choice("split", split, SPLITS)
    category = category or pick(rng, CATEGORIES)
    _check_choice("category", category, CATEGORIES)
    for _ in range(MAX_DRAWS):
        request = _draft(rng, category, mixed=split == "train" and rng.random() < MIXED_SHARE)
        if split == "heldout" and is_held_out(request):
            return request
        if split == "train" and is_training(request) and not _is_tight(request):
            return request
    raise RuntimeError(f"no {split} request of category {category} in {MAX_DRAWS} draws")


def sample_scene(rng: np.random.Generator, request: Request, *, split: str) -> Scene:
    """A scene that fulfils the request and shows nothing else; for training, nothing held out."""
    _check_choice("split", split, SPLITS)
    for _ in range(MAX_DRAWS):
        scene = _draft_scene(rng, request)
        if scene and (split == "heldout" or is_training(scene)):
            return scene
    raise RuntimeError(f"no {split} scene for {request} in {MAX_DRAWS} draws")


def sample_medley(rng: np.random.Generator) -> Scene:
    """Two or three things of different shapes, for training: nothing but the words tells which stands where."""
    num = int(rng.integers(2, 4))   # drawn once: three fit less often
    for _ in range(MAX_DRAWS):
        shapes = tuple(SHAPES[i] for i in rng.permutation(len(SHAPES))[:num])
        scene = _draft_scene(rng, Request("two_object", tuple(map(Group, shapes))))
        if scene and is_training(scene):
            return scene
    raise RuntimeError(f"no medley in {MAX_DRAWS} draws")


def pick(rng: np.random.Generator, choices):
    """One of a sequence. (`rng.choice` would turn the values into numpy scalars.)"""
    return choices[rng.integers(len(choices))]


def _draft(rng: np.random.Generator, category: str, *, mixed: bool) -> Request:
    background = pick(rng, BACKGROUNDS) if rng.random() < 0.4 else None
    one, other = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    colour, second_colour = (COLOURS[i] for i in rng.permutation(len(COLOURS))[:2])
    size, second_size = (pick(rng, SIZES) if rng.random() < 0.3 else None for _ in range(2))
    texture = pick(rng, TEXTURES) if rng.random() < 0.25 else None
    match category:
        case "single_object":
            groups = (Group(one, size=size, texture=texture),)
        case "two_object":
            groups = (Group(one, size=size), Group(other, size=second_size))
        case "counting":
            count = pick(rng, COUNTS)
            size = size if count == 2 or size == "small" else None  # three large ones do not fit
            groups = (Group(one, count, colour if mixed else None, size, texture),)
        case "colors":
            groups = (Group(one, 1, colour, size, texture),)
        case "position":
            counts = pick(rng, ((1, 1), (1, 1), (2, 1), (1, 2))) if mixed else (1, 1)
            colours = (colour, second_colour) if mixed else (None, None)
            groups = (Group(one, counts[0], colours[0]), Group(other, counts[1], colours[1]))
        case "color_attr":
            groups = (Group(one, colour=colour), Group(other, colour=second_colour))
    relation = pick(rng, tuple(RELATIONS)) if category == "position" else None
    return Request(category, groups, relation, background)


def _is_tight(request: Request) -> bool:
    """Whether training could hardly draw it: three things that may stand one way only.

    Two circles left of a square are seldom level with it, so they are also above or below it; where
    one of those relations is held out for the two shapes, hardly any scene is left.
    """
    if not request.relation or request.num_things <= 2:
        return False
    return any(combinations(dataclasses.replace(request, relation=relation)) & held_out_keys()
               for relation in RELATIONS)


def _draft_scene(rng: np.random.Generator, request: Request) -> Scene | None:
    """One try at placing every thing; None if one does not fit."""
    placed: list[Thing] = []
    for number, group in enumerate(request.groups):
        colour = group.colour or pick(rng, COLOURS)
        same_colour = rng.random() < 0.7
        before = tuple(placed) if number else ()
        for _ in range(group.count):
            if not (group.colour or same_colour):
                colour = pick(rng, COLOURS)
            texture = group.texture or ("striped" if rng.random() < 0.2 else "plain")
            size = draw_size(rng, group.size, num_things=request.num_things)
            thing = Thing(group.shape, colour, texture, 0.0, 0.0, size)
            thing = place(rng, thing, among=tuple(placed), after=before, relation=request.relation)
            if thing is None:
                return None
            placed.append(thing)
    return Scene(request.category, tuple(placed), request.background or pick(rng, BACKGROUNDS))


def place(rng: np.random.Generator, thing: Thing, *, among: tuple[Thing, ...],
          after: tuple[Thing, ...] = (), relation: str | None = None) -> Thing | None:
    """The thing at a free place, where `relation` holds from all of `after` to it; None if full."""
    low = BORDER + thing.size / 2
    for x, y in rng.uniform(low, 1 - low, (PLACES_TRIED, 2)).round(3).tolist():
        moved = dataclasses.replace(thing, x=x, y=y)
        if is_free(moved, among) and (
                not relation or all(holds_clearly(relation, one, moved) for one in after)):
            return moved
    return None


def draw_size(rng: np.random.Generator, word: str | None, *, num_things: int) -> float:
    """A size for the word; without one, any size that leaves room for `num_things` things."""
    if word is None:
        word = pick(rng, ("small", "medium", "large") if num_things <= 2 else ("small", "medium"))
    return round(float(rng.uniform(*DRAWN_SIZES[word])), 3)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
