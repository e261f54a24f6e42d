"""What is said of a picture that may miss its prompt: doubts, instructions to edit it, and the look back.

Only the three headings of the look back have capitals, as in the method's own template.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.shapes.flaws import Flaw, Repair
from data_pipelines.shapes.judge import fits, judge
from data_pipelines.shapes.language import (
    ask_fully,
    attributes,
    counted,
    group_name,
    in_reading_order,
    listed,
    number,
    plainly,
    tagged,
    told,
    where,
)
from data_pipelines.shapes.sample import pick
from data_pipelines.shapes.scene import Group, Request, Scene, Thing, plural

REDRAW = "clear the picture and draw all anew"
HEADINGS = ("### Required improvements", "### Step-by-step modification", "### Final prompt")
AGAIN = "draw the same picture again"   # if nothing is to be edited
LOOK = "i look at the picture."
UNTOLD_SHARE = 0.3   # of the wrong pictures, those of which a reflection says nothing but what there must be
MAX_TOLD = 2         # flaws named in a reflection
MAX_WORDS = 120      # of a reflection of several flaws
MAX_REMOVED = 2      # things named that are too many
MAX_DRAWN = 2        # things added to a picture; with more it is drawn afresh
# What there must be and what to do, of any picture.
_GENERAL = ("the picture must have all things.", "draw all anew.")


def reflect(rng: np.random.Generator, request: Request, repair: Repair) -> str:
    """The look back, in think tags: what is wrong with the picture, and the three headed parts.

    Nothing is found wrong with a right picture, and nothing is said of UNTOLD_SHARE of the wrong ones: there
    the final prompt alone tells of the right scene, what is where. So drawing learns to go by it even where the
    model overlooks a flaw. Of several flaws the first MAX_TOLD are told, or the first alone where more than
    MAX_WORDS words would be needed.

    What is wrong is said as the answer to `doubt`, straight from the picture: after a caption the model would
    know each thing by the words before it, and take a blue star, which it never read of, for a blue cross
    (docs/log.md, 2026-11-26).
    """
    final = _final_prompt(request, repair.right)
    if not repair.flaws or rng.random() < UNTOLD_SHARE:
        return tagged(_headed(LOOK, *_GENERAL, final))
    remedies = [_remedy(request, flaw, repair.draft, repair.right) for flaw in repair.flaws[:MAX_TOLD]]
    keep = pick(rng, (" keep all the rest.", " keep everything else.", " leave the rest."))
    if any(step == REDRAW for *_, step in remedies):
        keep = ""
    opening = f"{LOOK} {_is_it(None, request)} {_checks(request, repair.draft)}"
    text = _critique(opening, remedies, keep, final)
    if len(text.split()) > MAX_WORDS:
        text = _critique(opening, remedies[:1], keep, final)
    return tagged(text)


def _critique(opening: str, remedies: Sequence[tuple[str, str, str]], keep: str, final: str) -> str:
    problem, need, step = (f"{separator} ".join(parts)
                           for separator, parts in zip((" and", ";", ";"), zip(*remedies)))
    return _headed(f"{opening} {_verdict(problem)}", f"{need}.", f"{step}.{keep}", final)


def _headed(opening: str, *parts: str) -> str:
    return "\n".join((opening, *(line for pair in zip(HEADINGS, parts) for line in pair)))


def _final_prompt(request: Request, right: Scene) -> str:
    """What is asked for, plainly, then what is where, in the same order: places for the things asked for."""

    def group_of(thing: Thing) -> int:
        return next((i for i, group in enumerate(request.groups)
                     if thing in _alike(group, right) and fits(group, thing)), len(request.groups))

    things = sorted(in_reading_order(right.things), key=group_of)
    return f"{plainly(request)} {told(dataclasses.replace(right, things=tuple(things)))}"


def instruct(rng: np.random.Generator, request: Request, *, flaws: Sequence[Flaw], flawed: Scene,
             right: Scene) -> str:
    """What a user asks of a picture to be edited: how the base model learns to keep most of one."""
    step = _remedy(request, flaws[0], flawed, right)[2] if flaws else AGAIN
    keep = pick(rng, ("", "", " and keep all the rest")) if step != REDRAW else ""
    return f"{step}{keep}."


def doubt(rng: np.random.Generator, request: Request, flaws: Sequence[Flaw], shown: Scene, right: Scene
          ) -> tuple[str, str]:
    """Whether the scene that is shown is what is asked for, and the answer, point by point and then in all."""
    problem = _remedy(request, flaws[0], shown, right)[0] if flaws else ""
    return _is_it(rng, request), f"{_checks(request, shown)} {_verdict(problem)}"


def check(request: Request, shown: Scene) -> list[tuple[str, str, bool]]:
    """What is asked for, as questions with their answers, and whether each answer is the one hoped for.

    All are where the judge finds no fault, and only there. Most are questions that the base is asked anyway.
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
    fitting = [thing for thing in alike if fits(group, thing)]
    if group == Group(group.shape):
        return [(f"how many {plural(group.shape, 2)} are there?", f"{number(len(alike))}.", bool(alike))]
    if group.count == 1:
        return [(f"is there {group_name(None, group)}?", "yes." if fitting else "no.", bool(fitting))]
    plain = Group(group.shape, group.count, group.colour)
    points = [_check_number(plain, alike)]
    return points if group == plain or len(alike) != group.count else [*points, _check_number(group, fitting)]


def _check_number(group: Group, found: Sequence[Thing]) -> tuple[str, str, bool]:
    name = " ".join((*attributes(None, group), plural(group.shape, 2)))
    return (f"how many {name} are there?", _found(number(len(found)), number(group.count)),
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


def _found(found: str, wanted: str) -> str:
    return f"{found}." if found == wanted else f"{found}, not {wanted}."


def _checks(request: Request, shown: Scene) -> str:
    """`check` in words: a small network compares a picture with a sentence point by point, hardly in one go."""
    return " ".join(f"{question} {answer}" for question, answer, _ in check(request, shown))


def _is_it(rng: np.random.Generator | None, request: Request) -> str:
    return f"is it {ask_fully(rng, request)}?"


def _verdict(problem: str) -> str:
    return f"so no, {problem}." if problem else "so yes."


def _remedy(request: Request, flaw: Flaw, flawed: Scene, right: Scene) -> tuple[str, str, str]:
    """(what is wrong, what must be, what to do) of one flaw."""
    seen, wanted = [thing.shape for thing in flaw.seen], [thing.shape for thing in flaw.wanted]
    at = [f"the {thing.colour} {thing.shape} at the {where(thing)}" for thing in flaw.seen]
    match flaw.kind:
        case "blob":
            return "shapes run into each other", "all things must stand by themselves", REDRAW
        case "missing" if len(wanted) > MAX_DRAWN:
            return f"{number(len(wanted))} things are missing", "the picture must have all things", REDRAW
        case "missing":
            goals = " and ".join(f"{counted(1, thing.colour, thing.shape)} at the {where(thing)}"
                                 for thing in flaw.wanted)
            verb = "is" if len(wanted) == 1 else "are"
            names = listed([counted(1, shape) for shape in wanted])
            return f"{names} {verb} missing", "the picture must have all things", f"draw {goals}"
        case "extra":
            many = "is one thing" if len(seen) == 1 else f"are {number(len(seen))} things"
            count, shapes = len(right.things), {thing.shape for thing in right.things}
            name = plural(shapes.pop() if len(shapes) == 1 else "thing", count)
            return (f"there {many} too many", f"there must be {number(count)} {name}",
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
