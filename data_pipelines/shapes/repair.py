"""The critic and the painter: what a draft gets wrong, and the nearest scene that fulfils the request.

A draft is a picture that the base model drew for a prompt; a detector has said what is in it. Things of the
draft are paired with the things asked for. What fits stays where it is, with all that nobody asked about;
what does not is changed, drawn, removed or moved, and each of these is a `Flaw` to be named.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_pipelines.shapes.flaws import Flaw
from data_pipelines.shapes.judge import Sighting, judge
from data_pipelines.shapes.language import where
from data_pipelines.shapes.sample import draw_size, pick, place, sample_scene
from data_pipelines.shapes.scene import (
    BACKGROUNDS,
    BORDER,
    COLOURS,
    DRAWN_SIZES,
    Group,
    Request,
    Scene,
    Thing,
    has_size,
    holds,
    holds_clearly,
    is_free,
)
from data_pipelines.shapes.split import is_training

TRIES = 20  # each freer than the one before; then the scene is drawn afresh

# What it costs to make one thing into another. Both wrong shape and wrong colour: not the same thing at all.
SHAPE_COST, COLOUR_COST, TEXTURE_COST, SIZE_COST = 4.0, 2.0, 1.0, 1.0
UNPAIRED_COST = 5.5
NEAR = 0.12  # of the image side: what moved no further than that was not moved


@dataclasses.dataclass(frozen=True)
class Repair:
    """A draft as it was seen, the scene it should have been, and what lies between them."""

    draft: Scene
    right: Scene
    flaws: tuple[Flaw, ...]   # none: the draft fulfils the request, and `right` is it, drawn cleanly


def repair(rng: np.random.Generator, request: Request, seen: Sequence[Sighting], background: str, *,
           num_blobs: int = 0) -> Repair:
    """The nearest scene that may be trained on, fulfils the request and shows nothing else.

    That of a right draft is the draft itself, even where things stand closer together than scenes are made. A
    wrong one with blobs, which are no things, is drawn afresh: nothing said of its things would mend it.
    """
    things = tuple(Thing(one.shape, one.colour, one.texture, one.x, one.y, one.size) for one in seen)
    draft = Scene(request.category, things, background)
    same = Scene(request.category, tuple(map(_inside, things)), background)
    if (len(things) == request.num_things and is_training(same)
            and not any(judge(request, scene.things, background) for scene in (draft, same))):
        return Repair(draft, same, ())
    if num_blobs and judge(request, things, background):
        right = sample_scene(rng, request, split="train")
        return Repair(draft, right, (Flaw("blob", wanted=right.things),))
    slots = [group for group in request.groups for _ in range(group.count)]
    pairs = _pair(slots, things)
    for attempt in range(TRIES):
        freedom = attempt / TRIES
        painted = _paint(rng, request, slots, [things[i] if i is not None else None for i in pairs],
                         freedom=freedom)
        behind = request.background or (pick(rng, BACKGROUNDS) if rng.random() < freedom else background)
        if painted and not judge(request, painted, behind):
            right = Scene(request.category, painted, behind)
            if is_training(right):
                return Repair(draft, right, _list_flaws(request, draft, right, pairs))
    right = sample_scene(rng, request, split="train")
    if not judge(request, things, background):
        return Repair(draft, right, ())
    extra = (Flaw("extra", seen=things),) if things else ()
    return Repair(draft, right, (Flaw("missing", wanted=right.things), *extra))


def _pair(slots: Sequence[Group], things: Sequence[Thing]) -> list[int | None]:
    """For each thing asked for the index of the one that was drawn for it, None if there is none."""
    cost = np.full((len(slots), len(things) + len(slots)), UNPAIRED_COST)
    cost[:, :len(things)] = np.array([[_distance(slot, thing) for thing in things] for slot in slots]
                                     ).reshape(len(slots), len(things))
    chosen = linear_sum_assignment(cost)[1]
    return [int(i) if i < len(things) and cost[slot, i] < UNPAIRED_COST else None
            for slot, i in enumerate(chosen)]


def _distance(slot: Group, thing: Thing) -> float:
    return (SHAPE_COST * (thing.shape != slot.shape) + COLOUR_COST * (slot.colour not in (None, thing.colour))
            + TEXTURE_COST * (slot.texture not in (None, thing.texture))
            + SIZE_COST * (not has_size(slot.size, thing.size)))


def _paint(rng: np.random.Generator, request: Request, slots: Sequence[Group],
           drawn: Sequence[Thing | None], *, freedom: float) -> tuple[Thing, ...] | None:
    """Things that fulfil the request, each like its drawn one as far as that goes; None if they do not fit.

    With more `freedom` (0 to 1) places, sizes and colours that nobody asked about are given up more often.
    """
    things = [_wanted(rng, slot, one, len(slots), freedom) for slot, one in zip(slots, drawn)]
    if request.relation and len(things) == 2 and None not in drawn and not holds(request.relation, *things):
        one, other = things
        things = [dataclasses.replace(one, x=other.x, y=other.y), dataclasses.replace(other, x=one.x, y=one.y)]
    placed: list[Thing] = []
    first_count = request.groups[0].count
    for number, (thing, one) in enumerate(zip(things, drawn)):
        before = tuple(placed[:first_count]) if request.relation and number >= first_count else ()
        stays = one is not None and rng.random() >= freedom
        if not (stays and is_free(thing, tuple(placed))
                and all(holds_clearly(request.relation, first, thing) for first in before)):
            thing = place(rng, thing, among=tuple(placed), after=before, relation=request.relation)
        if thing is None:
            return None
        placed.append(thing)
    return tuple(placed)


def _wanted(rng: np.random.Generator, slot: Group, drawn: Thing | None, num_things: int,
            freedom: float) -> Thing:
    """What a thing should look like; it stands where the drawn one does, inside the border."""
    if drawn is None:
        size = draw_size(rng, slot.size, num_things=num_things)
        return Thing(slot.shape, slot.colour or pick(rng, COLOURS), slot.texture or "plain", 0.5, 0.5, size)
    low, high = (DRAWN_SIZES["small"][0], DRAWN_SIZES["large"][1])
    size = float(np.clip(drawn.size, low, high))
    if not has_size(slot.size, drawn.size) or rng.random() < freedom:
        size = draw_size(rng, slot.size, num_things=num_things)
    colour = slot.colour or (pick(rng, COLOURS) if rng.random() < freedom else drawn.colour)
    return _inside(Thing(slot.shape, colour, slot.texture or drawn.texture, drawn.x, drawn.y, size))


def _inside(thing: Thing) -> Thing:
    """The thing, moved so far as it would cross the picture's border."""
    reach = thing.size / 2 + BORDER
    x, y = (round(float(np.clip(at, reach, 1 - reach)), 3) for at in (thing.x, thing.y))
    return dataclasses.replace(thing, x=x, y=y, size=round(thing.size, 3))


def _list_flaws(request: Request, draft: Scene, right: Scene, pairs: Sequence[int | None]) -> tuple[Flaw, ...]:
    """What must change, the worst first. Nothing if the judge finds nothing."""
    if not judge(request, draft.things, draft.background):
        return ()
    paired = [(draft.things[i], wanted) for i, wanted in zip(pairs, right.things) if i is not None]
    flaws = []
    if missing := tuple(wanted for i, wanted in zip(pairs, right.things) if i is None):
        flaws.append(Flaw("missing", wanted=missing))
    if extra := tuple(one for i, one in enumerate(draft.things) if i not in pairs):
        flaws.append(Flaw("extra", seen=extra))
    slots = [group for group in request.groups for _ in range(group.count)]
    asked = [slot for i, slot in zip(pairs, slots) if i is not None]
    for slot, (seen, wanted) in zip(asked, paired):
        flaws += [Flaw(kind, (seen,), (wanted,)) for kind, is_wrong in (
            ("shape", seen.shape != slot.shape), ("colour", slot.colour not in (None, seen.colour)),
            ("texture", slot.texture not in (None, seen.texture)),
            ("size", not has_size(slot.size, seen.size))) if is_wrong]
    flaws += _misplaced(request, paired) if len(paired) == len(slots) else []
    # What had to make room, or to change so that the scene may be trained on, is told too.
    told = [thing for flaw in flaws if flaw.kind in ("place", "moved") for thing in flaw.seen]
    flaws += [Flaw("moved", (seen,), (wanted,)) for seen, wanted in paired
              if seen not in told and not _is_near(seen, wanted) and where(seen) != where(wanted)]
    if right.background != draft.background:
        flaws.append(Flaw("background"))
    # The judge may object where a repair cannot say why, for example to a thing counted twice.
    return tuple(flaws) or (Flaw("missing", wanted=right.things),)


def _misplaced(request: Request, paired: Sequence[tuple[Thing, Thing]]) -> list[Flaw]:
    """The flaw of a relation that did not hold: two things that change places, or those that moved."""
    count = request.groups[0].count
    ones, others = ([seen for seen, _ in part] for part in (paired[:count], paired[count:]))
    if not request.relation or all(holds(request.relation, one, other) for one in ones for other in others):
        return []
    if len(paired) == 2 and all(_is_near(seen, wanted) for (seen, _), (_, wanted) in zip(paired, paired[::-1])):
        return [Flaw("place", tuple(seen for seen, _ in paired), tuple(wanted for _, wanted in paired))]
    return [Flaw("moved", (seen,), (wanted,)) for seen, wanted in paired if not _is_near(seen, wanted)]


def _is_near(one: Thing, other: Thing) -> bool:
    return max(abs(one.x - other.x), abs(one.y - other.y)) < NEAR
