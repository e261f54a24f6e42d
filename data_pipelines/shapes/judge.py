"""Whether a picture fulfils a request, given the things in it: drawn ones or detected ones.

The rules are GenEval's. What is asked for must be there; other things do no harm, except that a
number of things (and every counting request) is exact. A relation must hold between all members of
the two groups, for some choice of them.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

from data_pipelines.shapes.scene import Group, Request, has_size, holds, plural


class Sighting(Protocol):
    """A thing of a scene or a detection of one; lengths are fractions of the image side."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    size: float


def judge(request: Request, things: Sequence[Sighting], background: str) -> tuple[str, ...]:
    """What is wrong, in words ("expected 3 stars, saw 2"); empty if the request is fulfilled."""
    members, reasons = [], []
    for group in request.groups:
        same_shape = [thing for thing in things if thing.shape == group.shape]
        alike = [thing for thing in same_shape if group.colour in (None, thing.colour)]
        fitting = [thing for thing in alike if fits(group, thing)]
        members.append(fitting)
        is_exact = group.count > 1 or request.category == "counting"
        wrong_number = len(alike) != group.count if is_exact else not alike
        if wrong_number:
            reasons.append(f"expected {_name(group)}, saw {_summary(alike, same_shape)}")
        elif len(fitting) < group.count:
            reasons.append(f"expected {_name(group)}, saw another size or texture")
    if request.relation and not reasons and not _is_related(request, *members):
        first, second = request.groups
        reasons.append(f"expected {_name(first)} {request.relation} {_name(second)}, "
                       "saw them elsewhere")
    if request.background not in (None, background):
        reasons.append(f"expected a {request.background} background, saw {background}")
    return tuple(reasons)


def fits(group: Group, thing: Sighting) -> bool:
    """Whether a thing has the texture and the size that are asked for; shape and colour are not looked at."""
    return group.texture in (None, thing.texture) and has_size(group.size, thing.size)


def _is_related(request: Request, ones: list[Sighting], others: list[Sighting]) -> bool:
    first, second = request.groups
    return any(all(holds(request.relation, one, other) for one in chosen for other in partners)
               for chosen in itertools.combinations(ones, first.count)
               for partners in itertools.combinations(others, second.count))


def _name(group: Group) -> str:
    words = (str(group.count), group.size, group.texture, group.colour,
             plural(group.shape, group.count))
    return " ".join(word for word in words if word)


def _summary(alike: list[Sighting], same_shape: list[Sighting]) -> str:
    if alike or not same_shape:
        return str(len(alike) or "none")
    return f"only {', '.join(sorted({thing.colour for thing in same_shape}))} ones"
