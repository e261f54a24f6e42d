"""The words: prompts, thoughts, captions, descriptions and questions, in one small vocabulary.

A tiny tokenizer is trained on these texts, so they stay short, plain and in lower case.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from data_pipelines.shapes.sample import pick
from data_pipelines.shapes.scene import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Request,
    Scene,
    Thing,
    has_size,
    holds_clearly,
    offset,
    plural,
)
from data_pipelines.shapes.split import is_training

SYSTEM_PROMPT = "plan the picture in think tags, draw it, then look again and improve it."
HOW_TO_THINK = "how should one think about the prompt before drawing this picture?"
HOW_TO_IMPROVE = "how should one improve the first picture to get the second one?"

WHAT_IS_WHERE = "what is where?"
SAY_PLAINLY = "say it plainly."
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYNONYMS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}

OPENINGS = (
    "{}", "{}", "just {}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}",
    "a scene with {}", "a simple picture of {}", "a clean image of {}", "a picture that shows {}",
    "an image where we see {}", "draw {}", "please draw {}", "can you draw {}?", "paint {}",
    "show {}", "show me {}", "make a picture of {}", "please make an image with {}",
    "create an image with {}", "generate an image of {}", "i want to see {}",
    "i would like a picture with {}",
)
JOINS = ("{} and {}", "{} and {}", "{} and also {}", "{} with {}", "{} together with {}",
         "both {} and {}")
RELATION_WORDS = {
    "left of": ("{} left of {}", "{} to the left of {}", "{} on the left side of {}"),
    "right of": ("{} right of {}", "{} to the right of {}", "{} on the right side of {}"),
    "above": ("{} above {}", "{} over {}", "{} higher than {}"),
    "below": ("{} below {}", "{} under {}", "{} lower than {}"),
}
BACKGROUND_WORDS = ("{} on a {} background", "{} with a {} background", "{}, on {}",
                    "{}. the background is {}")


def prompt(rng: np.random.Generator, request: Request) -> str:
    """What a user might type for the request."""
    text = pick(rng, OPENINGS).format(ask(rng, request))
    if not request.background:
        return text
    if text.endswith("?"):
        return f"{text[:-1]} on a {request.background} background?"
    return pick(rng, BACKGROUND_WORDS).format(text, request.background)


def think(rng: np.random.Generator, scene: Scene) -> str:
    """The base's thought before drawing, in think tags: what there will be, and not where."""
    return tagged(describe(rng, scene))


def plan(rng: np.random.Generator, scene: Scene, relation: str | None = None) -> str:
    """IRG's first thought, in think tags: what there will be, and of two kinds of things which side of which.

    That is the `relation` that was asked for if it holds, else the one with the most room. With the place of a
    single thing in it first pictures were right more often than second ones (docs/log.md, 2026-11-28).
    """
    kinds = list(_kinds(scene).values())
    if len(kinds) != 2:
        return think(rng, scene)
    pairs = list(itertools.product(*kinds))
    room = {name: min(offset(name, *pair) for pair in pairs) for name in RELATIONS}
    held = (name for name in (relation, max(room, key=room.__getitem__))
            if name and all(holds_clearly(name, *pair) for pair in pairs))
    return tagged(describe(rng, scene, next(held, None)))


def caption(rng: np.random.Generator | None, scene: Scene) -> str:
    """All that the picture shows and where, in any order; without an rng as one reads, from the top left."""
    things = in_reading_order(scene.things)
    order = range(len(things)) if rng is None else rng.permutation(len(things))
    return told(dataclasses.replace(scene, things=tuple(things[i] for i in order)))


def told(scene: Scene) -> str:
    """Every thing after its place, of one or two also the size, in the scene's order, and the background."""
    items = [_at(thing, full=len(scene.things) <= 2) for thing in scene.things]
    return "; ".join((*items, f"{scene.background} background."))


def in_reading_order(things: Sequence[Thing]) -> list[Thing]:
    """From the top left to the bottom right."""
    return sorted(things, key=lambda thing: (PLACES.index(where(thing)), thing.x))


def describe(rng: np.random.Generator, scene: Scene, relation: str | None = None) -> str:
    """What the picture shows, in at most 14 words: how the base thinks. `relation`: of two kinds."""
    names = [counted(len(things), *kind) for kind, things in _kinds(scene).items()]
    text = RELATION_WORDS[relation][0].format(*names) if relation else listed(names)
    if len(names) <= 2 and rng.random() < 0.5:
        text += f" on {scene.background}"
    return f"{text}."


def _kinds(scene: Scene) -> dict[tuple[str, str], list[Thing]]:
    """The things by colour and shape, as they come."""
    kinds: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things:
        kinds.setdefault((thing.colour, thing.shape), []).append(thing)
    return kinds


def question(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A question about the picture and its answer: what, how many, which colour, where, what is there."""
    thing = pick(rng, scene.things)
    same = [other for other in scene.things if other.shape == thing.shape]
    there = [other for other in scene.things if where(other) == where(thing)]
    match rng.integers(7):
        case 0:
            return pick(rng, ("what is in the picture?", "what does the image show?")), describe(
                rng, scene)
        case 1:
            shape = thing.shape if rng.random() < 0.7 else pick(rng, SHAPES)
            count = sum(other.shape == shape for other in scene.things)
            return f"how many {plural(shape, 2)} are there?", f"{number(count)}."
        case 2 if len(same) == 1:
            return f"what is the colour of the {thing.shape}?", f"{thing.colour}."
        case 3 if len(same) == 1:
            return f"where is the {thing.shape}?", f"at the {where(thing)}."
        case 4:
            known = [colour for colour in COLOURS
                     if is_training(Request("colors", (Group(thing.shape, 1, colour),)))]
            colour = thing.colour if rng.random() < 0.5 else pick(rng, known)
            seen = any(other.colour == colour for other in same)
            return f"is there {counted(1, colour, thing.shape)}?", "yes." if seen else "no."
        case 5:
            return "what is the colour of the background?", f"{scene.background}."
        case 6 if len(there) == 1:
            return f"what is at the {where(thing)}?", f"{counted(1, thing.colour, thing.shape)}."
    return "how many things are there?", f"{number(len(scene.things))}."


def questions(rng: np.random.Generator, scene: Scene, num: int) -> list[tuple[str, str]]:
    """`num` different questions about the picture, with their answers."""
    asked: dict[str, str] = {}
    while len(asked) < num:
        asked.update((question(rng, scene),))
    return list(asked.items())


def plainly(request: Request) -> str:
    """What is asked for in the plainest words."""
    return f"{ask_fully(None, request)}."


def ask_fully(rng: np.random.Generator | None, request: Request) -> str:
    """`ask`, and the background if one is asked for."""
    return ask(rng, request) + (f" on a {request.background} background" if request.background else "")


def tagged(text: str) -> str:
    """A thought as the model writes it."""
    return f"<think>{text}</think>"


def where(thing: Thing) -> str:
    """The place of a thing in a grid of three by three, for example "top left"."""
    row = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
    column = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
    return f"{row} {column}".strip() or "middle"


def size_word(thing: Thing) -> str | None:
    """What a thing's size may be called; None between small and large."""
    return next((size for size in SIZES if has_size(size, thing.size)), None)


def ask(rng: np.random.Generator | None, request: Request) -> str:
    """The request as a noun phrase; in its plainest words without an rng."""
    names = [group_name(rng, group) for group in request.groups]
    if len(names) == 1:
        return names[0]
    forms = RELATION_WORDS[request.relation] if request.relation else JOINS
    return (pick(rng, forms) if rng else forms[0]).format(*names)


def group_name(rng: np.random.Generator | None, group: Group) -> str:
    """A group as a noun phrase: "two small red circles"."""
    return counted(group.count, *attributes(rng, group), group.shape)


def attributes(rng: np.random.Generator | None, group: Group) -> list[str]:
    """What a prompt says of a group; its size in any of its words, or in the plainest without an rng."""
    size = pick(rng, SYNONYMS[group.size]) if rng and group.size else group.size
    return [word for word in (size, group.texture, group.colour) if word]


def number(count: int) -> str:
    """A count in words; no scene has more than nine things, but a base model may draw them."""
    return NUMBERS[count] if count < len(NUMBERS) else "many"


def counted(count: int, *words: str) -> str:
    """("one", "orange", "ring") as "an orange ring", or with a number and a plural."""
    phrase = " ".join((*words[:-1], plural(words[-1], count)))
    if count > 1:
        return f"{number(count)} {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _at(thing: Thing, *, full: bool) -> str:
    """The place first: what is read after it is bound to it. Said last, it left shapes free (docs/log.md)."""
    return f"{where(thing)}: {_look(thing, full=full)}"


def _look(thing: Thing, *, full: bool) -> str:
    size = size_word(thing) if full else None
    texture = thing.texture if thing.texture != "plain" else None
    return " ".join(word for word in (size, texture, thing.colour, thing.shape) if word)


def listed(names: list[str]) -> str:
    """The names with commas and an "and"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
