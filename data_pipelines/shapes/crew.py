"""The renderer as painter and the detector as critic: the miniature's part in curation.

A case's pictures are scenes; what the base drew is looked at by the detector unless its scene is known. A
prompt that `data_pipelines.curate` reads says in its field `request` what it asks for, as the lines of
`prompts_heldout.jsonl` do.
"""

import dataclasses

import numpy as np

from data_pipelines.curation.config import FilterConfig
from data_pipelines.curation.filters import Rules
from data_pipelines.curation.material import Case, Picture, Rejected, Round, Words
from data_pipelines.curation.painters import Painted
from data_pipelines.curation.templates import MARK
from data_pipelines.shapes import language, reflections
from data_pipelines.shapes.detect import detect_background, survey
from data_pipelines.shapes.drafts import Draft, SeenDraft
from data_pipelines.shapes.flaws import Repair
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.render import render
from data_pipelines.shapes.repair import repair_draft
from data_pipelines.shapes.sample import sample_scene
from data_pipelines.shapes.scene import Request, Scene
from data_pipelines.shapes.split import is_training

LICENCE = "Apache-2.0"
WORDS = Words(language.SYSTEM_PROMPT, language.HOW_TO_THINK, language.HOW_TO_IMPROVE)
HEADINGS = tuple(heading.removeprefix(f"{MARK} ") for heading in reflections.HEADINGS)
# Scenes are few, and meant to recur; the texts are short.
FILTERS = FilterConfig(min_thought_chars=1, min_reflection_chars=1, min_side=0, max_similarity=1.0,
                       near_bits=-1)
RULES = Rules(FILTERS, HEADINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class ShapesCase(Case):
    """A case of the miniature: its chance, a scene that fulfils it, and what the base drew if that is known."""

    rng: np.random.Generator | None = None
    right: Scene | None = None       # would do; of a draft that was mended, the scene that it became
    first: Round | None = None
    mended: Repair | None = None
    is_seen: bool = False            # all that is known of its pictures is what the detector sees


class ShapesCrew:
    """Sketcher, painter and critic. One case's methods are called by one thread, in order."""

    name = "shapes detector"

    def __init__(self, side: int):
        """Args: side of the square images, in pixels."""
        self._side = side

    def has(self, case: ShapesCase) -> bool:
        """Whether the case brings what the base drew."""
        return case.first is not None

    def sketch(self, case: ShapesCase) -> Round:
        """Raises: Rejected if the case brings none."""
        if case.first is None:
            raise Rejected("no_first_round")
        return case.first

    def paint(self, case: ShapesCase, first: Round | None) -> Painted:
        """The right scene; of a first round, with as much of it as can stay."""
        scene = self._mend(case, first).right if first else case.right
        return Painted(Picture.drawn(render(scene, side=self._side)), {"by": "shapes renderer"})

    def think(self, case: ShapesCase, image: Picture) -> str:
        """What the image shows."""
        scene = _look(case.request, image.pixels)[0] if case.is_seen else case.right
        if not scene.things:
            raise Rejected("empty_image", "the detector sees nothing")
        return language.plan(case.rng, scene, case.request.relation)

    def reflect(self, case: ShapesCase, first: Round, better: Picture) -> str:
        """What is wrong with the first picture, and the scene that it should become."""
        return reflections.reflect(case.rng, case.request, self._mend(case, first))

    def rate(self, case: ShapesCase, image: Picture) -> float:
        """10 if the detector sees what was asked for, else 0."""
        scene, _ = _look(case.request, image.pixels)
        return 0.0 if judge(case.request, scene.things, scene.background) else 10.0

    def _mend(self, case: ShapesCase, first: Round) -> Repair:
        if case.mended is not None:
            return case.mended
        pixels = first.image.pixels
        scene, num_blobs = _look(case.request, pixels)
        if not is_training(scene):
            raise Rejected("held_out", "the first picture shows what no training picture may")
        draft = Draft(case.prompt, case.request, first.thought, case.right, pixels)
        return repair_draft(SeenDraft(draft, scene.things, scene.background, num_blobs))


def understand(case: Case, rng: np.random.Generator) -> ShapesCase:
    """A case of the command as one of the miniature.

    Raises: ValueError if it brings no request; Rejected if no training picture may show what it asks for.
    """
    if case.request is None:
        raise ValueError(f"prompt {case.id}: lacks the field 'request', which tells the shapes detector what "
                         "is asked for")
    try:
        request = Request.from_json(case.request)
    except ValueError as error:
        raise ValueError(f"prompt {case.id}: {error}") from error
    if not is_training(request):
        raise Rejected("held_out", "the prompt asks for what no training picture may show")
    try:
        right = sample_scene(rng, request, split="train")
    except RuntimeError as error:    # drawn often enough
        raise Rejected("no_scene", str(error)) from error
    known = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return ShapesCase(**known | {"request": request, "rng": rng, "right": right, "is_seen": True})


def _look(request: Request, pixels: np.ndarray) -> tuple[Scene, int]:
    """What the detector sees in an image, and how many regions it cannot name.

    Raises: Rejected if the image is not square: the detector knows no other.
    """
    height, width = pixels.shape[:2]
    if height != width:
        raise Rejected("not_square", f"{width} x {height} pixels")
    things, num_blobs = survey(pixels)
    return Scene(request.category, tuple(things), detect_background(pixels)), num_blobs
