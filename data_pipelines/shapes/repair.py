"""The critic and the painter: what a draft gets wrong, and the right scene that its second picture shows.

A draft is a picture that the base model drew after a thought; a detector has said what is in it. If it shows
what the request asks for it is right as it is. Else the painter keeps of it what can stay, and takes the rest
from a scene that would do; what differs is a `Flaw`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_pipelines.shapes.drafts import SeenDraft
from data_pipelines.shapes.flaws import Flaw, Repair
from data_pipelines.shapes.judge import Sighting, judge
from data_pipelines.shapes.scene import (
    BORDER,
    DRAWN_SIZES,
    Group,
    Request,
    Scene,
    Thing,
    has_size,
    holds,
    is_free,
)
from data_pipelines.shapes.split import is_training

# What it costs to make one thing into another. Both wrong shape and wrong colour: not the same thing at all.
SHAPE_COST, COLOUR_COST, TEXTURE_COST, SIZE_COST = 4.0, 2.0, 1.0, 1.0
PLACE_COST = 1.0      # of the image side; it decides between things that are alike
UNPAIRED_COST = 5.5
NEAR = 0.12  # of the image side: what moved no further than that was not moved
_SPOTS = tuple(itertools.product(np.linspace(0.15, 0.85, 15).round(3).tolist(), repeat=2))   # to move things to


def repair_draft(seen: SeenDraft) -> Repair:
    """What a draft shows and should show: see `repair`."""
    draft = seen.draft
    return repair(draft.request, draft.wanted, seen.things, seen.background, num_blobs=seen.num_blobs)


def repair(request: Request, wanted: Scene, seen: Sequence[Sighting], background: str, *,
           num_blobs: int = 0) -> Repair:
    """The draft itself if it is right, even with things closer together than scenes are made; else most of it.

    `wanted` fulfils the request and may be trained on. A draft with blobs, which are no things, is drawn
    afresh as `wanted` if it is not right: nothing said of its things would mend it. The judge lets more things
    pass than were asked for; in a wrong draft they are flaws too, for the right scene shows nothing else.
    """
    things = tuple(Thing(one.shape, one.colour, one.texture, one.x, one.y, one.size) for one in seen)
    draft = Scene(request.category, things, background)
    same = Scene(request.category, tuple(map(_inside, things)), background)
    if is_training(same) and not any(judge(request, scene.things, background) for scene in (draft, same)):
        return Repair(draft, same, ())
    if num_blobs:
        return Repair(draft, wanted, (Flaw("blob", wanted=wanted.things),))
    right = _mend(request, wanted, same)
    return Repair(draft, right, _list_flaws(request, draft, right))


def _mend(request: Request, wanted: Scene, draft: Scene) -> Scene:
    """The draft with no more changed than is needed, of the ways that are tried here; at worst `wanted`."""
    slots = _slots(request)
    cost = np.array([[_miss(group, thing) + PLACE_COST * _far(thing, want) for thing in draft.things]
                     for group, want in zip(slots, wanted.things)]).reshape(len(slots), len(draft.things))
    drawn = [None if i is None else _correct(group, draft.things[i], want)
             for group, i, want in zip(slots, _pair(cost), wanted.things)]
    paired = [slot for slot, thing in enumerate(drawn) if thing]
    grounds = dict.fromkeys((request.background or draft.background, wanted.background))
    for num_kept in range(len(paired), -1, -1):
        for kept in itertools.combinations(paired, num_kept):
            for ground, others in itertools.product(grounds, _others(drawn, wanted)):
                things = _arrange(drawn, kept, others)
                scene = things and Scene(request.category, things, ground)
                if scene and is_training(scene) and not judge(request, scene.things, scene.background):
                    return scene
    return wanted


def _others(drawn: Sequence[Thing | None], wanted: Scene) -> Iterator[list[Thing]]:
    """What to put where a thing cannot stay: the same beside its place, the same elsewhere, another."""
    here = [thing or want for thing, want in zip(drawn, wanted.things)]
    yield here
    yield [dataclasses.replace(thing, x=want.x, y=want.y) for thing, want in zip(here, wanted.things)]
    yield list(wanted.things)


def _arrange(drawn: Sequence[Thing | None], kept: Sequence[int], others: Sequence[Thing]
             ) -> tuple[Thing, ...] | None:
    """The things that are kept, and the others at the free spots nearest to where they are; None if full."""
    placed: dict[int, Thing] = {}
    for slot in kept:
        if not is_free(drawn[slot], tuple(placed.values())):
            return None
        placed[slot] = drawn[slot]
    for slot, other in enumerate(others):
        if slot in placed:
            continue
        spots = sorted(_SPOTS, key=lambda spot: abs(spot[0] - other.x) + abs(spot[1] - other.y))
        moved = (dataclasses.replace(other, x=x, y=y) for x, y in ((other.x, other.y), *spots))
        thing = next((one for one in moved if is_free(one, tuple(placed.values()))), None)
        if thing is None:
            return None
        placed[slot] = thing
    return tuple(placed[slot] for slot in range(len(others)))


def _correct(group: Group, thing: Thing, wanted: Thing) -> Thing:
    """The thing as it was asked for, and of a size that scenes have."""
    smallest, largest = DRAWN_SIZES["small"][0], DRAWN_SIZES["large"][1]
    size = round(float(np.clip(thing.size, smallest, largest)), 3)
    return _inside(dataclasses.replace(
        thing, shape=group.shape, colour=group.colour or thing.colour, texture=group.texture or thing.texture,
        size=size if has_size(group.size, size) else wanted.size))


def _slots(request: Request) -> list[Group]:
    """The group of every thing that is asked for."""
    return [group for group in request.groups for _ in range(group.count)]


def _pair(cost: np.ndarray) -> list[int | None]:
    """For each row, a thing that is wanted, the column of the one that was drawn for it; None if none was."""
    rows, columns = cost.shape
    cost = np.concatenate([cost, np.full((rows, rows), UNPAIRED_COST)], axis=1)
    chosen = linear_sum_assignment(cost)[1]
    return [int(i) if i < columns and cost[row, i] < UNPAIRED_COST else None for row, i in enumerate(chosen)]


def _miss(group: Group, thing: Thing) -> float:
    """What a thing lacks of what was asked for."""
    return (SHAPE_COST * (thing.shape != group.shape) + COLOUR_COST * (group.colour not in (None, thing.colour))
            + TEXTURE_COST * (group.texture not in (None, thing.texture))
            + SIZE_COST * (not has_size(group.size, thing.size)))


def _distance(wanted: Thing, thing: Thing) -> float:
    return (SHAPE_COST * (thing.shape != wanted.shape) + COLOUR_COST * (thing.colour != wanted.colour)
            + TEXTURE_COST * (thing.texture != wanted.texture) + SIZE_COST * abs(thing.size - wanted.size)
            + PLACE_COST * _far(thing, wanted))


def _far(one: Thing, other: Thing) -> float:
    return max(abs(one.x - other.x), abs(one.y - other.y))


def _inside(thing: Thing) -> Thing:
    """The thing, moved so far as it would cross the picture's border."""
    reach = thing.size / 2 + BORDER
    x, y = (round(float(np.clip(at, reach, 1 - reach)), 3) for at in (thing.x, thing.y))
    return dataclasses.replace(thing, x=x, y=y, size=round(thing.size, 3))


def _list_flaws(request: Request, draft: Scene, right: Scene) -> tuple[Flaw, ...]:
    """What must change, the worst first; of what is wanted only what was asked for too."""
    cost = np.array([[_distance(one, thing) for thing in draft.things] for one in right.things])
    drawn = [draft.things[i] if i is not None else None
             for i in _pair(cost.reshape(len(right.things), len(draft.things)))]
    slots = _slots(request)
    paired = [(slot, seen, wanted) for slot, seen, wanted in zip(slots, drawn, right.things) if seen]
    flaws = []
    if missing := tuple(wanted for seen, wanted in zip(drawn, right.things) if seen is None):
        flaws.append(Flaw("missing", wanted=missing))
    if extra := tuple(thing for thing in draft.things if thing not in drawn):
        flaws.append(Flaw("extra", seen=extra))
    for slot, seen, wanted in paired:
        flaws += [Flaw(kind, (seen,), (wanted,)) for kind, is_wrong in (
            ("shape", seen.shape != slot.shape), ("colour", slot.colour not in (None, seen.colour)),
            ("texture", slot.texture not in (None, seen.texture)),
            ("size", not has_size(slot.size, seen.size))) if is_wrong]
    if len(paired) == len(slots):
        flaws += _misplaced(request, [(seen, wanted) for _, seen, wanted in paired])
    if request.background not in (None, draft.background):
        flaws.append(Flaw("background"))
    # The judge may object, or the split, where no thing can be blamed. Then all is drawn afresh.
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
    return _far(one, other) < NEAR
