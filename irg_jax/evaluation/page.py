"""Renders `report.html`: geometry and choices here, the page itself in `page.html.j2`.

The page carries its images and curves in itself, runs no script and asks the network for nothing;
its own Content-Security-Policy says so too.
"""

import base64
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from irg_jax.evaluation.drawing import split_sections
from irg_jax.evaluation.results import STAGES, SYSTEMS, Result, Run, read_image
from irg_jax.evaluation.statistics import DIFFERENCES, OUTCOMES, align_verdicts, classify_outcomes

PANELS = {  # title -> metrics drawn in it
    "Text loss (CE)": ("ce",),
    "Image loss (MSE)": ("mse",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Tokens a second": ("tokens_per_second",),
    "Pack fill": ("fill_text", "fill_vit", "fill_latent"),
}
FROM_ZERO = {"Learning rate", "Tokens a second", "Pack fill"}
LEFT, RIGHT, TOP, BOTTOM, GAP = 46.0, 352.0, 10.0, 138.0, 14.0  # the plot inside a 360 x 168 panel
NUM_BINS = 90
WHISKER_WIDTH = 108.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """SVG points: the mean of each bin of steps, and the band from its least to its largest."""

    name: str
    stage: str
    line: str
    band: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart; `ticks` are (y, label), `spans` are (middle x, label) of each stage."""

    title: str
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    spans: tuple[tuple[float, str], ...]
    logarithmic: bool


def render_page(run: Run, report: Mapping[str, Any], *, gallery_size: int = 8) -> str:
    """The whole page as HTML; `gallery_size` trajectories are shown of each outcome."""
    folder = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["duration"] = format_duration
    return environment.get_template("page.html.j2").render(
        report=report, systems=SYSTEMS, rows=_list_rows(report),
        panels=[draw_panel(title, run.metrics) for title in PANELS],
        gallery=choose_gallery(run.results, gallery_size))


def choose_gallery(results: Sequence[Result], size: int) -> list[dict[str, Any]]:
    """Per outcome its count and at most `size` prompts, taken from each category in turn.

    The choice knows neither texts nor images, only ids: what is shown is not picked by hand.
    """
    by_key = {(result.id, result.system): result for result in results}
    gallery = []
    for outcome, names in classify_outcomes(align_verdicts(results)).items():
        seen: dict[str, int] = {}
        ranks = {}
        for name in names:
            category = by_key[name, "turn1"].category
            ranks[name] = seen[category] = seen.get(category, -1) + 1
        shown = sorted(names, key=ranks.__getitem__)[:size]
        gallery.append({"outcome": outcome, "count": len(names), "right": OUTCOMES[outcome],
                        "prompts": [{system: _show(by_key[name, system]) for system in SYSTEMS}
                                    for name in shown]})
    return gallery


def draw_panel(title: str, metrics: Mapping[str, Mapping[str, np.ndarray]]) -> Panel:
    """The curves of one panel, both stages side by side in equal width, on one vertical axis."""
    names = PANELS[title]
    bins = {(stage, name): _bin(metrics[stage]["step"], metrics[stage][name])
            for stage in STAGES for name in names}
    values = np.concatenate([band for _, *bands in bins.values() for band in bands])
    low, high = float(values.min()), float(values.max())
    logarithmic = title not in FROM_ZERO and low > 0 and high > 20 * low
    scale = math.log10 if logarithmic else float
    bottom = scale(low) if title not in FROM_ZERO else min(low, 0.0)
    padding = 0.06 * (scale(high) - bottom) or abs(bottom) or 1.0
    top, bottom = scale(high) + padding, bottom - padding * (title not in FROM_ZERO)
    place = lambda value: BOTTOM - (BOTTOM - TOP) * (scale(value) - bottom) / (top - bottom)

    width = (RIGHT - LEFT - GAP) / len(STAGES)
    curves, spans = [], []
    for index, stage in enumerate(STAGES):
        start, last = LEFT + index * (width + GAP), float(metrics[stage]["step"][-1])
        spans.append((start + width / 2, f"stage {index + 1}: {last + 1:,.0f} steps"))
        for name in names:
            steps, means, lows, highs = bins[stage, name]
            x = start + width * steps / max(last, 1.0)
            upper = _points(x, map(place, highs))
            lower = _points(x[::-1], map(place, lows[::-1]))
            label = name.removeprefix("fill_") if len(names) > 1 else ""
            curves.append(Curve(label, stage, _points(x, map(place, means)), f"{upper} {lower}"))
    limits = [10**bottom, 10**top] if logarithmic else [bottom, top]
    ticks = tuple((place(value), format_short(value))
                  for value in choose_ticks(*limits, logarithmic=logarithmic))
    return Panel(title, tuple(curves), ticks, tuple(spans), logarithmic)


def choose_ticks(low: float, high: float, *, logarithmic: bool = False) -> list[float]:
    """Two to six round numbers from low to high, 1, 2 or 5 times a power of ten."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        decades = [10.0**power for power in powers if low <= 10.0**power <= high]
        if len(decades) > 1:
            return decades[:: math.ceil(len(decades) / 6)]
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [tick for tick in ticks if low <= tick <= high]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def format_short(value: float) -> str:
    """A tick's label: 0.25, 12k, 3M, 2e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def format_duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(middle step, mean, least, largest) of at most NUM_BINS runs of lines, each [bins]."""
    chunks = min(NUM_BINS, len(steps))
    parts = zip(np.array_split(steps, chunks), np.array_split(values, chunks), strict=True)
    table = [(step.mean(), value.mean(), value.min(), value.max()) for step, value in parts]
    return tuple(np.array(table).T)


def _points(x: Sequence[float], y: Any) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in zip(x, y, strict=True))


def _show(result: Result) -> dict[str, Any]:
    image = base64.b64encode(read_image(result.image)).decode("ascii")
    return {"prompt": result.prompt, "category": result.category.replace("_", " "),
            "correct": result.correct, "reasons": result.reasons, "seen": result.seen,
            "sections": split_sections(result.text), "image": f"data:image/png;base64,{image}"}


def _list_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: per category its scores and, drawn to one scale, its two differences."""
    rows = [("overall", {name: report[name] for name in DIFFERENCES})]
    rows += [(category, {name: report["differences_by_category"][name][category]
                         for name in DIFFERENCES})
             for category in report["base"] if category != "overall"]
    ends = [abs(end) for _, row in rows for difference in row.values()
            for end in difference["ci95"]]
    extent = max(0.1, math.ceil(10 * max(ends)) / 10)
    place = lambda value: WHISKER_WIDTH / 2 + (WHISKER_WIDTH / 2 - 8) * value / extent
    return [{"name": category.replace("_", " "),
             "scores": {system: report[system][category] for system in SYSTEMS},
             "differences": [{**row[name], "x": place(row[name]["mean"]),
                              "ends": [place(end) for end in row[name]["ci95"]]}
                             for name in DIFFERENCES]}
            for category, row in rows]
