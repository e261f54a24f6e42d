"""The held-out split: which combinations no training picture may ever show.

There are six kinds of combination, one a category. About 15 % of each kind is held out: the keys of
a kind are ranked by the sha256 of their text and the first 15 % are taken, so the split is the
same on every machine and each kind gets its share.
"""

import functools
import hashlib
import itertools
import math

from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, COUNTS, SHAPES, Request, Scene, holds

HELD_OUT_SHARE = 0.15
# Of the first 400 seeds, the one that spreads the held-out keys most evenly over the words.
SPLIT_SEED = 274

Key = tuple[str, ...]


def all_keys() -> tuple[Key, ...]:
    """Every combination of every kind; the first word of a key is its kind."""
    pairs = tuple(itertools.combinations(sorted(SHAPES), 2))
    return (
        *(("shape on background", *key) for key in itertools.product(SHAPES, BACKGROUNDS)),
        *(("shape and shape", *pair) for pair in pairs),
        *(("count of shape", str(count), shape) for count in COUNTS for shape in SHAPES),
        *(("colour of shape", *key) for key in itertools.product(COLOURS, SHAPES)),
        *(("shape by shape", one, relation, other)
          for one, other in itertools.permutations(SHAPES, 2) for relation in ("left of", "above")),
        *(("coloured pair", f"{first} {one}", f"{second} {other}")
          for one, other in pairs for first, second in itertools.product(COLOURS, repeat=2)),
    )


KIND_OF_CATEGORY = {
    "single_object": "shape on background",
    "two_object": "shape and shape",
    "counting": "count of shape",
    "colors": "colour of shape",
    "position": "shape by shape",
    "color_attr": "coloured pair",
}


@functools.cache
def held_out_keys() -> frozenset[Key]:
    """The held-out part of `all_keys`."""
    chosen: set[Key] = set()
    for kind in KIND_OF_CATEGORY.values():
        keys = sorted((key for key in all_keys() if key[0] == kind), key=_rank)
        chosen.update(keys[:math.ceil(HELD_OUT_SHARE * len(keys))])
    return frozenset(chosen)


@functools.singledispatch
def combinations(what: Request | Scene) -> frozenset[Key]:
    """Every combination that a scene shows, or that any picture fulfilling a request must show."""
    raise TypeError(f"combinations are defined for Request and Scene, not {type(what).__name__}")


@combinations.register
def _(what: Scene) -> frozenset[Key]:
    keys: set[Key] = set()
    for thing in what.things:
        keys.add(("shape on background", thing.shape, what.background))
        keys.add(("colour of shape", thing.colour, thing.shape))
    for shape in {thing.shape for thing in what.things}:
        count = sum(thing.shape == shape for thing in what.things)
        keys.add(("count of shape", str(count), shape))
    for one, other in itertools.permutations(what.things, 2):
        if one.shape < other.shape:
            keys.add(("shape and shape", one.shape, other.shape))
            keys.add(_coloured_pair(one, other))
        if one.shape != other.shape:
            keys.update(("shape by shape", one.shape, relation, other.shape)
                        for relation in ("left of", "above") if holds(relation, one, other))
    return frozenset(keys) & _universe()


@combinations.register
def _(what: Request) -> frozenset[Key]:
    keys: set[Key] = set()
    for group in what.groups:
        keys.add(("shape on background", group.shape, str(what.background)))
        keys.add(("colour of shape", str(group.colour), group.shape))
        keys.add(("count of shape", str(group.count), group.shape))
    if len(what.groups) == 2:
        one, other = sorted(what.groups, key=lambda group: group.shape)
        keys |= {("shape and shape", one.shape, other.shape), _coloured_pair(one, other)}
    if what.relation:
        one, other = what.groups
        if what.relation in ("right of", "below"):
            one, other = other, one
        relation = {"right of": "left of", "below": "above"}.get(what.relation, what.relation)
        keys.add(("shape by shape", one.shape, relation, other.shape))
    return frozenset(keys) & _universe()


def is_training(what: Request | Scene) -> bool:
    """Whether it may be trained on: it holds no held-out combination of any kind."""
    return not combinations(what) & held_out_keys()


def is_held_out(request: Request) -> bool:
    """Whether it may be tested on: the key of its own category is held out, and no other is.

    So a held-out prompt asks for one thing that was never seen, and names nothing else that is new.
    """
    kinds = {key[0] for key in combinations(request) & held_out_keys()}
    return kinds == {KIND_OF_CATEGORY[request.category]}


def _coloured_pair(one, other) -> Key:
    return ("coloured pair", f"{one.colour} {one.shape}", f"{other.colour} {other.shape}")


@functools.cache
def _universe() -> frozenset[Key]:
    return frozenset(all_keys())


def _rank(key: Key) -> str:
    return hashlib.sha256(f"{SPLIT_SEED}: {', '.join(key)}".encode()).hexdigest()
