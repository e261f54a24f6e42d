"""The words: prompts, plans, descriptions, reflections and questions, in one small vocabulary.

A tiny tokenizer is trained on these texts, so they stay short, plain and in lower case. Only the
three headings of a reflection have capitals, as in the method's own template.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.shapes.flaws import Flaw, Repair
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.sample import pick
from data_pipelines.shapes.scene import (
    COLOURS,
    SHAPES,
    SIZES,
    Group,
    Request,
    Scene,
    Thing,
    has_size,
    plural,
)
from data_pipelines.shapes.split import is_training

SYSTEM_PROMPT = "plan the picture in think tags, draw it, then look again and improve it."
HOW_TO_THINK = "how should one think about the prompt before drawing this picture?"
HOW_TO_IMPROVE = "how should one improve the first picture to get the second one?"

WHAT_IS_WHERE = "what is where?"
SAY_PLAINLY = "say it plainly."
REDRAW = "clear the picture and draw all anew"

HEADINGS = ("### Required improvements", "### Step-by-step modification", "### Final prompt")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYNONYMS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
MAX_TOLD = 2         # flaws named in a reflection
MAX_WORDS = 120      # of a reflection of several flaws
MAX_REMOVED = 2      # things named that are too many
MAX_DRAWN = 2        # things added to a picture; with more it is drawn afresh

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


def think(rng: np.random.Generator, request: Request, scene: Scene) -> str:
    """The plan before drawing, in think tags: what, which colour, where, from the bottom up. At most 30 words.

    In any order but this the same place was planned twice; and as the look back reads from the top, it cannot
    repeat the plan instead of looking.
    """
    items = _placed(scene)
    if request.relation and len(items) == 2:
        items[0] += f", {request.relation} the {scene.things[1].shape}"
    opening = pick(rng, ("the plan.", "i plan this.", "the picture needs this.", "i will draw this."))
    told = "; ".join(items[i] for i in reversed(_reading_order(scene)))
    return tagged(f"{opening} {told}; {scene.background} background.")


def caption(rng: np.random.Generator | None, scene: Scene) -> str:
    """All that the picture shows and where, in any order; without an rng as one reads, from the top left."""
    items = _placed(scene)
    order = _reading_order(scene) if rng is None else rng.permutation(len(items))
    return "; ".join((*(items[i] for i in order), f"{scene.background} background."))


def _reading_order(scene: Scene) -> list[int]:
    place = lambda i: (PLACES.index(where(scene.things[i])), scene.things[i].x)
    return sorted(range(len(scene.things)), key=place)


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """What the picture shows, in at most 14 words: how the base model thinks."""
    kinds: dict[tuple[str, str], int] = {}
    for thing in scene.things:
        kinds[thing.colour, thing.shape] = kinds.get((thing.colour, thing.shape), 0) + 1
    names = [_counted(count, colour, shape) for (colour, shape), count in kinds.items()]
    text = _listed(names)
    if len(names) <= 2 and rng.random() < 0.5:
        text += f" on {scene.background}"
    return f"{text}."


def reflect(rng: np.random.Generator, request: Request, repair: Repair) -> str:
    """The look back, in think tags: what is there, if it is what was asked for, then the three headed parts.

    The first two are said as the base says them of any picture, in reading order (`caption`) and then as the
    answer to `doubt`: what was planned is no help there, so it cannot be repeated instead of looking.
    Of several flaws the first MAX_TOLD are told, or the first alone where more than MAX_WORDS words would be
    needed; the final prompt tells all of the right scene, or what was asked for if it is there.
    """
    flaws, right = repair.flaws, repair.right
    remedies = [_remedy(request, flaw, repair.draft, right) for flaw in flaws[:MAX_TOLD]] or [_PRAISE]
    keep = pick(rng, (" keep all the rest.", " keep everything else.", " leave the rest."))
    if not flaws or any(step == REDRAW for *_, step in remedies):
        keep = ""
    final = caption(None, right) if flaws else plainly(request)
    opening = (f"i look at the picture. {caption(None, repair.draft)} {_is_it(None, request)} "
               f"{_checks(request, repair.draft)}")
    text = _four_parts(remedies, opening, keep, final)
    if len(text.split()) > MAX_WORDS:
        text = _four_parts(remedies[:1], opening, keep, final)
    return tagged(text)


def _four_parts(remedies: Sequence[tuple[str, str, str]], opening: str, keep: str, final: str) -> str:
    problem, need, step = (f"{separator} ".join(parts)
                           for separator, parts in zip((" and", ";", ";"), zip(*remedies)))
    first, second, third = HEADINGS
    return f"{opening} {_verdict(problem)}\n{first}\n{need}.\n{second}\n{step}.{keep}\n{third}\n{final}"


def instruct(rng: np.random.Generator, request: Request, *, flaws: Sequence[Flaw], flawed: Scene,
             right: Scene) -> str:
    """What a user asks of a picture to be edited: how the base model learns to keep most of one."""
    step = _remedy(request, flaws[0], flawed, right)[2] if flaws else _PRAISE[2]
    keep = pick(rng, ("", "", " and keep all the rest")) if step != REDRAW else ""
    return f"{step}{keep}."


_PRAISE = ("", "no change is needed", "draw the same picture again")   # no problem, hence what to do


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
            return f"how many {plural(shape, 2)} are there?", f"{NUMBERS[count]}."
        case 2 if len(same) == 1:
            return f"what is the colour of the {thing.shape}?", f"{thing.colour}."
        case 3 if len(same) == 1:
            return f"where is the {thing.shape}?", f"at the {where(thing)}."
        case 4:
            known = [colour for colour in COLOURS
                     if is_training(Request("colors", (Group(thing.shape, 1, colour),)))]
            colour = thing.colour if rng.random() < 0.5 else pick(rng, known)
            seen = any(other.colour == colour for other in same)
            return f"is there {_counted(1, colour, thing.shape)}?", "yes." if seen else "no."
        case 5:
            return "what is the colour of the background?", f"{scene.background}."
        case 6 if len(there) == 1:
            return f"what is at the {where(thing)}?", f"{_counted(1, thing.colour, thing.shape)}."
    return "how many things are there?", f"{NUMBERS[len(scene.things)]}."


def questions(rng: np.random.Generator, scene: Scene, num: int) -> list[tuple[str, str]]:
    """`num` different questions about the picture, with their answers."""
    asked: dict[str, str] = {}
    while len(asked) < num:
        asked.update((question(rng, scene),))
    return list(asked.items())


def plainly(request: Request) -> str:
    """What is asked for in the plainest words."""
    return f"{_asked(None, request)}."


def doubt(rng: np.random.Generator, request: Request, flaws: Sequence[Flaw], shown: Scene, right: Scene
          ) -> tuple[str, str]:
    """Whether the scene that is shown is what is asked for, and the answer, point by point and then in all."""
    problem = _remedy(request, flaws[0], shown, right)[0] if flaws else ""
    return _is_it(rng, request), f"{_checks(request, shown)} {_verdict(problem)}"


def check(request: Request, shown: Scene) -> list[tuple[str, str, bool]]:
    """What is asked for, as questions with their answers, and whether each is what was asked for.

    All are exactly where the judge finds no fault. Most are questions that the base is asked of any picture.
    """
    points = [point for group in request.groups for point in _check_group(group, shown)]
    if request.relation and all(is_met for *_, is_met in points):
        points += _check_relation(request, shown)
    if request.background:
        points.append(("what is the colour of the background?", _found(shown.background, request.background),
                       shown.background == request.background))
    return points


def _check_group(group: Group, shown: Scene) -> list[tuple[str, str, bool]]:
    alike = _alike(group, shown)
    fitting = [thing for thing in alike
               if group.texture in (None, thing.texture) and has_size(group.size, thing.size)]
    is_plain = not (group.size or group.texture)
    if group.count == 1 and not (is_plain and group.colour is None):
        return [(f"is there {_group(None, group)}?", "yes." if fitting else "no.", bool(fitting))]
    if group.count == 1:
        return [(f"how many {plural(group.shape, 2)} are there?", f"{_number(alike)}.", bool(alike))]
    points = [_check_number(Group(group.shape, group.count, group.colour), alike)]
    return points if is_plain or len(alike) != group.count else [*points, _check_number(group, fitting)]


def _check_number(group: Group, found: Sequence[Thing]) -> tuple[str, str, bool]:
    name = " ".join((*_words(None, group), plural(group.shape, 2)))
    return (f"how many {name} are there?", _found(_number(found), NUMBERS[group.count]),
            len(found) == group.count)


def _check_relation(request: Request, shown: Scene) -> list[tuple[str, str, bool]]:
    """Of things that are all there."""
    points, names = [], []
    for group in request.groups:
        found = [where(thing) for thing in _alike(group, shown)]
        names.append(f"{'is' if len(found) == 1 else 'are'} the {plural(group.shape, len(found))}")
        points.append((f"where {names[-1]}?", f"{' and '.join(f'at the {place}' for place in found)}.", True))
    is_met = not judge(dataclasses.replace(request, background=None), shown.things, shown.background)
    other = names[1].partition(" ")[2]
    return [*points, (f"{names[0]} {request.relation} {other}?", "yes." if is_met else "no.", is_met)]


def _alike(group: Group, shown: Scene) -> list[Thing]:
    return [thing for thing in shown.things
            if thing.shape == group.shape and group.colour in (None, thing.colour)]


def _number(things: Sequence[Thing]) -> str:
    return NUMBERS[min(len(things), len(NUMBERS) - 1)]


def _found(found: str, wanted: str) -> str:
    return f"{found}." if found == wanted else f"{found}, not {wanted}."


def _checks(request: Request, shown: Scene) -> str:
    """`check` in words: a small network compares a picture with a sentence point by point, hardly in one go."""
    return " ".join(f"{question} {answer}" for question, answer, _ in check(request, shown))


def _is_it(rng: np.random.Generator | None, request: Request) -> str:
    return f"is it {_asked(rng, request)}?"


def _verdict(problem: str) -> str:
    return f"so no, {problem}." if problem else "so yes."


def _asked(rng: np.random.Generator | None, request: Request) -> str:
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


def _remedy(request: Request, flaw: Flaw, flawed: Scene, right: Scene) -> tuple[str, str, str]:
    """(what is wrong, what must be, what to do) of one flaw."""
    seen, wanted = [thing.shape for thing in flaw.seen], [thing.shape for thing in flaw.wanted]
    at = [f"the {_name(thing)} at the {where(thing)}" for thing in flaw.seen]
    match flaw.kind:
        case "blob":
            return "shapes run into each other", "all things must stand by themselves", REDRAW
        case "missing" if len(wanted) > MAX_DRAWN:
            return f"{NUMBERS[len(wanted)]} things are missing", "the picture must have all things", REDRAW
        case "missing":
            goals = " and ".join(f"{_counted(1, thing.colour, thing.shape)} at the {where(thing)}"
                                 for thing in flaw.wanted)
            verb = "is" if len(wanted) == 1 else "are"
            names = _listed([_counted(1, shape) for shape in wanted])
            return f"{names} {verb} missing", "the picture must have all things", f"draw {goals}"
        case "extra":
            many = "is one thing" if len(seen) == 1 else f"are {NUMBERS[len(seen)]} things"
            count, shapes = len(right.things), {thing.shape for thing in right.things}
            name = plural(shapes.pop() if len(shapes) == 1 else "thing", count)
            return (f"there {many} too many", f"there must be {NUMBERS[count]} {name}",
                    f"remove {' and '.join(at[:MAX_REMOVED])}")
        case "background":
            return (f"the background is {flawed.background}",
                    f"the background must be {right.background}",
                    f"paint the background {right.background}")
        case "place":
            one, other = wanted
            return (f"the {one} is on the wrong side of the {other}",
                    f"the {one} must be {request.relation} the {other}",
                    f"swap {at[0]} with {at[1]}")
        case "moved":
            need = "there must be room for all things"
            if request.relation:
                need = f"the {request.groups[0].shape} must be {request.relation} the {request.groups[1].shape}"
            return (f"the {seen[0]} is in the wrong place", need,
                    f"move {at[0]} to the {where(flaw.wanted[0])}")
        case "shape":
            return (f"there is a {seen[0]} that should be a {wanted[0]}",
                    f"the {seen[0]} must become a {wanted[0]}", f"turn {at[0]} into a {wanted[0]}")
        case "colour":
            colour = flaw.wanted[0].colour
            return (f"a {seen[0]} is {flaw.seen[0].colour}", f"the {seen[0]} must be {colour}",
                    f"paint {at[0]} {colour}")
        case "texture":
            texture = flaw.wanted[0].texture
            return (f"a {seen[0]} is {flaw.seen[0].texture}", f"the {seen[0]} must be {texture}",
                    f"make {at[0]} {texture}")
        case "size":
            is_large = flaw.seen[0].size > flaw.wanted[0].size
            wrong, fix = ("large", "smaller") if is_large else ("small", "larger")
            return (f"a {seen[0]} is too {wrong}", f"the {seen[0]} must be {fix}",
                    f"make {at[0]} {fix}")
    raise ValueError(f"flaw.kind is {flaw.kind!r}: see Flaw for the kinds")


def ask(rng: np.random.Generator | None, request: Request) -> str:
    """The request as a noun phrase; in its plainest words without an rng."""
    names = [_group(rng, group) for group in request.groups]
    if len(names) == 1:
        return names[0]
    forms = RELATION_WORDS[request.relation] if request.relation else JOINS
    return (pick(rng, forms) if rng else forms[0]).format(*names)


def _group(rng: np.random.Generator | None, group: Group) -> str:
    return _counted(group.count, *_words(rng, group), group.shape)


def _words(rng: np.random.Generator | None, group: Group) -> list[str]:
    size = pick(rng, SYNONYMS[group.size]) if rng and group.size else group.size
    return [word for word in (size, group.texture, group.colour) if word]


def _counted(count: int, *words: str) -> str:
    """("one", "orange", "ring") as "an orange ring", or with a number and a plural."""
    phrase = " ".join((*words[:-1], plural(words[-1], count)))
    if count > 1:
        return f"{NUMBERS[count]} {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _placed(scene: Scene) -> list[str]:
    """Every thing after its place; of one or two also the size."""
    return [_at(thing, full=len(scene.things) <= 2) for thing in scene.things]


def _at(thing: Thing, *, full: bool) -> str:
    """The place first: what is read after it is bound to it. Said last, it left shapes free (docs/log.md)."""
    return f"{where(thing)}: {_look(thing, full=full)}"


def _look(thing: Thing, *, full: bool) -> str:
    size = size_word(thing) if full else None
    texture = thing.texture if thing.texture != "plain" else None
    return " ".join(word for word in (size, texture, thing.colour, thing.shape) if word)


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
