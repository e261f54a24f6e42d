"""One case from its prompt to the material of its records, or to why there is none.

    first round -> better image -> size -> score -> thought -> similarity -> reflection -> safety

What fails costs nothing more. A case has two sides: the initial modes, told
of the image and a thought that leads to it, and the improving ones, told of a first round and a reflection.
Either may fail alone; a bad image fails both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from data_pipelines.curation.compose import IMPROVING, INITIAL, compose
from data_pipelines.curation.critics import Critic
from data_pipelines.curation.filters import (
    Rules,
    check_length,
    check_quality,
    check_side,
    check_similarity,
    check_unicode,
)
from data_pipelines.curation.material import Case, Material, Picture, Rejected, Rejection, Round, Words
from data_pipelines.curation.painters import Painter
from data_pipelines.curation.sketchers import Sketcher
from data_pipelines.curation.writing import Row
from data_pipelines.endpoints import Declined

T = TypeVar("T")
CASE = "case"
SIDES = {"initial": INITIAL, "improving": IMPROVING}


class Crew(NamedTuple):
    """Who does the work; without a sketcher nothing is improved, without a painter pairs bring the images."""

    critic: Critic
    painter: Painter | None = None
    sketcher: Sketcher | None = None


class Plan(NamedTuple):
    """What is wanted of every case."""

    modes: Sequence[str]
    words: Words
    rules: Rules
    improve_pairs: bool = False

    def sides(self, case: Case, crew: Crew) -> list[str]:
        """Those that are wanted of a case."""
        wanted = [side for side, modes in SIDES.items() if not {*modes}.isdisjoint(self.modes)]
        may_improve = crew.sketcher is not None and (case.image is None or self.improve_pairs)
        return [side for side in wanted if side == "initial" or may_improve]


class Gathered(NamedTuple):
    """What became of a case."""

    case: Case
    material: Material | None            # None if the whole case is rejected
    modes: tuple[str, ...]               # that can be told
    rejections: tuple[Rejection, ...]
    provenance: dict[str, Any]           # of all its records
    fingerprint: int | None = None       # of an image that a painter made


def gather(case: Case, *, crew: Crew, plan: Plan) -> Gathered:
    """Asks for all that the wanted modes of a case need.

    Raises: EndpointError, BudgetSpent.
    """
    rejections: list[Rejection] = []
    provenance: dict[str, Any] = {"prompt": case.source}
    wanted, first = plan.sides(case, crew), None
    try:
        if not wanted:
            raise Rejected("no_mode", "a pair is not improved, and the config wants no initial mode")
        if "improving" in wanted:
            first = _attempt(lambda: _sketch(case, crew, plan), "improving", case, rejections)
        # Whoever has no first round is still told from the start.
        sides = [side for side in wanted if side == "initial" or first]
        if not sides:
            return Gathered(case, None, (), tuple(rejections), provenance)
        image, maker = _paint(case, crew, first)
        _check_image(case, image, crew, plan)
        texts = {side: _attempt(lambda side=side: _write(side, case, first, image, crew, plan), side, case,
                                rejections) for side in sides}
        told = [side for side in sides if texts[side]]
        if not told:
            return Gathered(case, None, (), tuple(rejections), provenance)
        material = Material(plan.words, case.prompt, image, texts.get("initial") or "",
                            first if "improving" in told else None, texts.get("improving") or "")
        _check_safety(material, plan.rules)
    except (Rejected, Declined) as fault:
        return Gathered(case, None, (), (_reject(case, CASE, fault),), provenance)
    provenance |= {"image": {**maker, "sha256": image.sha256}, "texts": crew.critic.name}
    if material.first:
        provenance["first"] = {**material.first.source, "sha256": material.first.image.sha256}
    is_new = case.image is None and plan.rules.config.near_bits >= 0
    modes = tuple(mode for mode in plan.modes if any(mode in SIDES[side] for side in told))
    return Gathered(case, material, modes, tuple(rejections), provenance,
                    image.look.fingerprint if is_new else None)


def tell(gathered: Gathered, mode: str) -> Row | None:
    """The record of a mode; None if it cannot be told."""
    if mode not in gathered.modes:
        return None
    case = gathered.case
    return Row(compose(mode, gathered.material), case.id, case.licence, gathered.provenance)


def _attempt(work: Callable[[], T], side: str, case: Case, rejections: list[Rejection]) -> T | None:
    """What `work` returns; None, and a rejection, if it fails."""
    try:
        return work()
    except (Rejected, Declined) as fault:
        rejections.append(_reject(case, side, fault))
        return None


def _reject(case: Case, what: str, fault: Rejected | Declined) -> Rejection:
    if isinstance(fault, Declined):
        return Rejection(case.id, what, "declined", str(fault))
    return Rejection(case.id, what, fault.cause, fault.told)


def _sketch(case: Case, crew: Crew, plan: Plan) -> Round:
    first, config = crew.sketcher.sketch(case), plan.rules.config
    _refuse(check_unicode(first.thought)
            or check_length(first.thought, "first_thought", 1, config.max_thought_chars))
    if config.min_side:
        _refuse(check_side(first.image.look, config))
    return first


def _paint(case: Case, crew: Crew, first: Round | None) -> tuple[Picture, dict[str, Any]]:
    if case.image is not None:
        return case.image, {"by": "pair"}
    if crew.painter is None:
        raise Rejected("no_image", "the prompt brings no image, and there is no painter")
    return crew.painter.paint(case, first)


def _check_image(case: Case, image: Picture, crew: Crew, plan: Plan) -> None:
    config = plan.rules.config
    if config.min_side and case.image is None:    # a pair's was looked at before
        _refuse(check_side(image.look, config))
    if config.min_quality > 0:
        score = crew.critic.rate(case, image)
        _refuse(check_quality(score, config), f"{score:g}")


def _write(side: str, case: Case, first: Round | None, image: Picture, crew: Crew, plan: Plan) -> str:
    rules = plan.rules
    if side == "initial":
        thought = crew.critic.think(case, image)
        _refuse(rules.judge_thought(thought), thought[:300])
        return thought
    if rules.config.min_similarity > -1 or rules.config.max_similarity < 1:
        _refuse(check_similarity(first.image.look, image.look, rules.config))
    reflection = crew.critic.reflect(case, first, image)
    _refuse(rules.judge_reflection(reflection), reflection[:300])
    return reflection


def _check_safety(material: Material, rules: Rules) -> None:
    if rules.safety is None:
        return
    first = material.first
    texts = [text for text in (material.thought, first and first.thought, material.reflection) if text]
    images = [first.image, material.image] if first else [material.image]
    _refuse(rules.judge_safety(material.prompt, texts, [image.pixels for image in images]))


def _refuse(cause: str, told: str = "") -> None:
    if cause:
        raise Rejected(cause, told)
