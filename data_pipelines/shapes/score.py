"""A picture against its request, as GenEval does it, from pixels alone."""

import dataclasses

import numpy as np

from data_pipelines.shapes.detect import Detection, detect, detect_background
from data_pipelines.shapes.judge import judge
from data_pipelines.shapes.scene import Request


@dataclasses.dataclass(frozen=True)
class Score:
    """`reasons` says in words what is wrong ("expected 3 stars, saw 2"); empty if correct."""

    correct: bool
    reasons: tuple[str, ...]
    detections: tuple[Detection, ...]


def score(request: Request, image: np.ndarray) -> Score:
    """Whether the picture uint8 [H, H, 3] fulfils the request, why not, and what was seen in it."""
    detections = tuple(detect(image))
    reasons = judge(request, detections, detect_background(image))
    return Score(not reasons, reasons, detections)
