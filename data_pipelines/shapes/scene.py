"""What can be in a picture, and what a prompt can ask of one.

A `Scene` is concrete: every thing has a shape, colour, texture, place and size. A `Request` is what
a prompt says: groups of things, each with only the attributes that are asked for. Lengths are
fractions of the image side, x to the right and y down: a scene is the same at 64 and at 96 pixels.
"""

import dataclasses
from typing import Any, Protocol

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
TEXTURES = ("plain", "striped")
BACKGROUNDS = ("white", "grey", "pale yellow", "pale orange", "pale pink", "pale purple",
               "pale blue", "pale green")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COUNTS = (2, 3, 4)

# Drawn sizes leave room on both sides of the sizes that a judge accepts for the word.
DRAWN_SIZES = {"small": (0.25, 0.29), "medium": (0.29, 0.36), "large": (0.39, 0.45)}
ACCEPTED_SIZES = {"small": (0.0, 0.33), "large": (0.34, 1.0)}
SIZES = tuple(ACCEPTED_SIZES)

BORDER = 0.03     # from a thing to the edge of the picture
CLEARANCE = 0.05  # between two things, along at least one axis


class Placed(Protocol):
    """Anything with a place: a thing of a scene, or one that a detector saw."""

    x: float
    y: float
    size: float


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape: centre (x, y) and side of its square frame, as fractions of the image side."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    size: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; `category` is that of the request it was made for."""

    category: str
    things: tuple[Thing, ...]
    background: str

    def to_json(self) -> dict[str, Any]:
        """A dictionary for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Scene":
        """The inverse of `to_json`. Raises ValueError naming the field and what it may hold."""
        fields = _checked_fields(data, cls, "scene")
        _expect(fields.get("category"), CATEGORIES, "scene.category")
        _expect(fields.get("background"), BACKGROUNDS, "scene.background")
        rows = fields.get("things")
        if not isinstance(rows, (list, tuple)):
            raise ValueError(f"scene.things is {rows!r}: give a list")
        things = tuple(_thing_from_json(row, f"scene.things[{i}]") for i, row in enumerate(rows))
        return cls(**{**fields, "things": things})


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` things of one shape; None means that the prompt does not say."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None
    texture: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a prompt asks: one or two groups; with two, `relation` says where the first stands."""

    category: str
    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def num_things(self) -> int:
        return sum(group.count for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for `json.dumps`; what is not asked for is left out."""
        groups = [_without_none(dataclasses.asdict(group)) for group in self.groups]
        rest = {"relation": self.relation, "background": self.background}
        return {"category": self.category, "groups": groups} | _without_none(rest)

    @classmethod
    def from_json(cls, data: Any) -> "Request":
        """The inverse of `to_json`. Raises ValueError naming the field and what it may hold."""
        fields = _checked_fields(data, cls, "request")
        _expect(fields.get("category"), CATEGORIES, "request.category")
        _expect(fields.get("relation"), (None, *RELATIONS), "request.relation")
        _expect(fields.get("background"), (None, *BACKGROUNDS), "request.background")
        rows = fields.get("groups")
        if not isinstance(rows, list) or not 1 <= len(rows) <= 2:
            raise ValueError(f"request.groups is {rows!r}: give a list of one or two groups")
        groups = tuple(_group_from_json(row, f"request.groups[{i}]") for i, row in enumerate(rows))
        if fields.get("relation") and len(groups) != 2:
            raise ValueError(f"request.relation is {fields['relation']!r}, but there is one group: "
                             "a relation needs two")
        return cls(**{**fields, "groups": groups})


def holds(relation: str, one: Placed, other: Placed) -> bool:
    """Whether `one` is left of / right of / above / below `other`.

    Centres must differ by half the mean size along the axis; what happens along the other axis does
    not matter, so a thing at the top left is both left of and above one at the bottom right.
    """
    return offset(relation, one, other) >= (one.size + other.size) / 4


def holds_clearly(relation: str, one: Placed, other: Placed) -> bool:
    """As `holds`, with empty space between the two: how scenes are made."""
    return offset(relation, one, other) >= (one.size + other.size) / 2 + CLEARANCE


def is_free(thing: Thing, others: tuple[Thing, ...]) -> bool:
    """Whether a thing is inside the picture and comes near no other."""
    reach = thing.size / 2 + BORDER
    return reach <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - reach and all(
        max(abs(thing.x - one.x), abs(thing.y - one.y)) >= (thing.size + one.size) / 2 + CLEARANCE
        for one in others)


def has_size(size: str | None, measured: float) -> bool:
    """Whether a measured size may be called `size`; anything may if the prompt does not say."""
    low, high = ACCEPTED_SIZES[size] if size else (0.0, 1.0)
    return low <= measured <= high


def plural(shape: str, count: int) -> str:
    """The name of so many things of a shape."""
    return shape if count == 1 else f"{shape}es" if shape == "cross" else f"{shape}s"


def offset(relation: str, one: Placed, other: Placed) -> float:
    """How far the centre of `one` lies on the relation's side of the other's, in shares of the side."""
    right, down = RELATIONS[relation]
    return (one.x - other.x) * right + (one.y - other.y) * down


def _group_from_json(data: Any, place: str) -> Group:
    fields = _checked_fields(data, Group, place)
    _expect(fields.get("shape"), SHAPES, f"{place}.shape")
    _expect(fields.get("count", 1), (1, *COUNTS), f"{place}.count")
    _expect(fields.get("colour"), (None, *COLOURS), f"{place}.colour")
    _expect(fields.get("size"), (None, *SIZES), f"{place}.size")
    _expect(fields.get("texture"), (None, *TEXTURES), f"{place}.texture")
    return Group(**fields)


def _thing_from_json(data: Any, place: str) -> Thing:
    fields = _checked_fields(data, Thing, place)
    for name, allowed in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES)):
        _expect(fields.get(name), allowed, f"{place}.{name}")
    for name in ("x", "y", "size"):
        value = fields.get(name)
        if type(value) is not float or not 0 <= value <= 1:
            raise ValueError(f"{place}.{name} is {value!r}: give a fraction of the image side, 0.0 to 1.0")
    return Thing(**fields)


def _checked_fields(data: Any, kind: type, place: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(data, dict):
        raise ValueError(f"{place} is {data!r}: give an object with {', '.join(names)}")
    if unknown := sorted(set(data) - set(names)):
        raise ValueError(f"{place} has unknown fields {unknown}: it may hold {', '.join(names)}")
    return dict(data)


def _expect(value: Any, allowed: tuple, place: str) -> None:
    # `True == 1` in Python, and a list is not hashable: compare type and value one by one.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise ValueError(f"{place} is {value!r}: choose one of {choices}")


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
