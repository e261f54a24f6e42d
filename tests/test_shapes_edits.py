"""Edits: what leads from the first picture to the right one is said, and nothing held out is shown."""

import collections

import numpy as np

from data_pipelines.shapes import reflections
from data_pipelines.shapes.edits import crowd, edit_draft, make_edit
from data_pipelines.shapes.flaws import make_flawed
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.repair import repair
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import Group, Request, Scene, Thing
from data_pipelines.shapes.split import is_training


def orders(count):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        request = sample_request(rng, split="train")
        yield rng, request, sample_scene(rng, request, split="train")


def names(scene):
    return [f"{thing.colour} {thing.shape}" for thing in scene.things]


def test_an_edit_keeps_changes_or_redraws():
    kinds = collections.Counter()
    for rng, request, right in orders(600):
        flawed, flaw = make_flawed(rng, request, right, split="train")
        flaws = (flaw,) if rng.random() < 0.75 else ()
        edit = make_edit(rng, request, "the prompt", right=right, flawed=flawed, flaws=flaws)
        assert edit.right == right and is_training(edit.first) and edit.said[:1] in ((), ("the prompt",))
        kind = "redraw" if reflections.REDRAW in edit.instruction else "change" if flaws else "keep"
        kinds[kind] += 1
        match kind:
            case "keep":
                assert edit.first == right and "draw the same picture again" in edit.instruction
            case "change":
                assert edit.first == flawed
            case "redraw":
                assert all(name in edit.instruction for name in names(right)) and "keep" not in edit.instruction
    assert min(kinds.values()) > 100, kinds


def test_what_was_said_before_may_be_wrong_about_the_picture():
    said = collections.Counter()
    for rng, request, right in orders(400):
        edit = make_edit(rng, request, "the prompt", right=right, flawed=right, flaws=())
        told = set(edit.said[1:2])
        said["nothing" if not edit.said else "prompt" if not told else
             "right" if all(name in edit.said[1] for name in names(right)) else "other"] += 1
    assert min(said.values()) > 40 and len(said) == 4


def test_a_crowd_holds_things_that_run_into_each_other():
    sizes = [len(crowd(rng, request).things) - request.num_things for rng, request, _ in orders(300)]
    assert set(sizes) == {0, 1, 2, 3, 4} and 0.3 < np.mean(np.array(sizes) > 0) < 0.7


def test_a_right_draft_with_more_than_was_asked_for_is_kept():
    """The base's own, of two green diamonds for one: whatever one becomes, the request is fulfilled."""
    request = Request("colors", (Group("diamond", 1, "green"),))
    things = tuple(Thing("diamond", "green", "plain", x, 0.5, 0.25) for x in (0.25, 0.75))
    drawn = repair(request, Scene("colors", things[:1], "pale yellow"), things, "pale yellow")
    assert not drawn.flaws and len(drawn.right.things) == 2
    for seed in range(40):
        edit = edit_draft(np.random.default_rng(seed), request, "the prompt", drawn)
        assert edit.right == drawn.right and "draw the same picture again" in edit.instruction


def test_a_draft_is_mended_kept_or_changed_and_the_end_is_told():
    kinds = collections.Counter()
    for rng, request, planned in orders(400):
        shown = make_flawed(rng, request, planned, split="train")[0] if rng.random() < 0.4 else planned
        drawn = repair(request, planned, shown.things, shown.background)
        edit = edit_draft(rng, request, "the prompt", drawn)
        assert is_training(edit.right) and edit.first.things == shown.things
        if drawn.flaws:
            kinds["mended"] += 1
            assert edit.right == drawn.right
        elif "draw the same picture again" in edit.instruction:
            kinds["kept"] += 1
            assert edit.right == drawn.right
            continue
        else:
            kinds["changed"] += 1
            assert judge(request, edit.right.things, edit.right.background) and edit.right != drawn.right
        assert all(name in edit.instruction for name in names(edit.right))
    assert min(kinds.values()) > 50, kinds
