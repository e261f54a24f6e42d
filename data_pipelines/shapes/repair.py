"""The critic and the painter: what a draft gets wrong, and the right scene that its second picture shows.

A draft is a picture that the base model drew after a plan; a detector has said what is in it. If it shows
what the request asks for it is right as it is, whatever was planned. Else the right scene is the wanted one,
which is the plan or what it should have been: things of the draft are paired with those wanted, and what
misses the request is a `Flaw`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_pipelines.shapes.drafts import SeenDraft
from data_pipelines.shapes.flaws import Flaw, Repair
from data_pipelines.shapes.judge import Sighting, judge
from data_pipelines.shapes.scene import BORDER, Request, Scene, Thing, has_size, holds
from data_pipelines.shapes.split import is_training

# What it costs to make one thing into another. Both wrong shape and wrong colour: not the same thing at all.
SHAPE_COST, COLOUR_COST, TEXTURE_COST, SIZE_COST = 4.0, 2.0, 1.0, 1.0
PLACE_COST = 1.0      # of the image side; it decides between things that are alike
UNPAIRED_COST = 5.5
NEAR = 0.12  # of the image side: what moved no further than that was not moved


def repair_draft(seen: SeenDraft) -> Repair:
    """What a draft shows and should show: see `repair`."""
    draft = seen.draft
    return repair(draft.request, draft.wanted, seen.things, seen.background, num_blobs=seen.num_blobs)


def repair(request: Request, wanted: Scene, seen: Sequence[Sighting], background: str, *,
           num_blobs: int = 0) -> Repair:
    """The draft itself if it is right, even with things closer together than scenes are made; else `wanted`.

    `wanted` fulfils the request and may be trained on. A draft with blobs, which are no things, is drawn
    afresh if it is not right: nothing said of its things would mend it. The judge lets more things pass than
    were asked for; in a wrong draft they are flaws too, for the wanted scene shows nothing else.
    """
    things = tuple(Thing(one.shape, one.colour, one.texture, one.x, one.y, one.size) for one in seen)
    draft = Scene(request.category, things, background)
    same = Scene(request.category, tuple(map(_inside, things)), background)
    if is_training(same) and not any(judge(request, scene.things, background) for scene in (draft, same)):
        return Repair(draft, same, ())
    blob = Flaw("blob", wanted=wanted.things)
    flaws = (blob,) if num_blobs else _list_flaws(request, draft, wanted)
    return Repair(draft, wanted, flaws)


def _pair(wanted: Sequence[Thing], things: Sequence[Thing]) -> list[int | None]:
    """For each wanted thing the index of the one that was drawn for it, None if there is none."""
    cost = np.full((len(wanted), len(things) + len(wanted)), UNPAIRED_COST)
    cost[:, :len(things)] = np.array([[_distance(one, thing) for thing in things] for one in wanted]
                                     ).reshape(len(wanted), len(things))
    chosen = linear_sum_assignment(cost)[1]
    return [int(i) if i < len(things) and cost[slot, i] < UNPAIRED_COST else None
            for slot, i in enumerate(chosen)]


def _distance(wanted: Thing, thing: Thing) -> float:
    return (SHAPE_COST * (thing.shape != wanted.shape) + COLOUR_COST * (thing.colour != wanted.colour)
            + TEXTURE_COST * (thing.texture != wanted.texture) + SIZE_COST * abs(thing.size - wanted.size)
            + PLACE_COST * max(abs(thing.x - wanted.x), abs(thing.y - wanted.y)))


def _inside(thing: Thing) -> Thing:
    """The thing, moved so far as it would cross the picture's border."""
    reach = thing.size / 2 + BORDER
    x, y = (round(float(np.clip(at, reach, 1 - reach)), 3) for at in (thing.x, thing.y))
    return dataclasses.replace(thing, x=x, y=y, size=round(thing.size, 3))


def _list_flaws(request: Request, draft: Scene, right: Scene) -> tuple[Flaw, ...]:
    """What must change, the worst first; of what is wanted only what was asked for too."""
    drawn = [draft.things[i] if i is not None else None for i in _pair(right.things, draft.things)]
    slots = [group for group in request.groups for _ in range(group.count)]
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
    return max(abs(one.x - other.x), abs(one.y - other.y)) < NEAR
