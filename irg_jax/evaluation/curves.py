"""Curves of a training as points of an SVG: all stages side by side, one chart a kind of number.

What is drawn is decided by what the logs hold: a chart whose metrics no stage has logged is left out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chart:
    """Which metrics share one panel; a name that ends in `/` stands for all that begin with it."""

    title: str
    names: tuple[str, ...]
    unit: str = ""
    from_zero: bool = False


CHARTS = (
    Chart("Text loss (CE)", ("ce",)),
    Chart("Image loss (MSE)", ("mse",)),
    Chart("Loss per mode (CE)", ("ce/",)),
    Chart("Loss per mode (MSE)", ("mse/",)),
    Chart("Gradient norm", ("grad_norm",)),
    Chart("Gradient norm per group", ("grad_norm/",)),
    Chart("Update ratio", ("update_ratio",)),
    Chart("Learning rate", ("learning_rate",), from_zero=True),
    Chart("Tokens a second", ("tokens_per_second",), from_zero=True),
    Chart("MFU", ("mfu",), from_zero=True),
    Chart("Memory of a device", ("hbm_gib",), "GiB", from_zero=True),
    Chart("Data wait", ("data_wait_seconds",), "seconds"),
    Chart("Pack fill", ("fill_text", "fill_vit", "fill_latent"), from_zero=True),
    Chart("Skipped steps", ("skipped_steps",), from_zero=True),
)
LEFT, RIGHT, TOP, BOTTOM, GAP = 46.0, 352.0, 10.0, 138.0, 14.0  # the plot inside a 360 x 168 panel
NUM_BINS = 90
MAX_CURVES = 12                  # of a chart
LETTER_WIDTH = 5.6               # of a label, about
SMALLEST, LARGEST = 1e-100, 1e100     # what is beyond is drawn as zero, or at the edge


@dataclasses.dataclass(frozen=True)
class Curve:
    """SVG points: the mean of each bin of steps, and the band from its least to its largest."""

    name: str
    stage: str
    color: int
    dash: int
    line: str
    band: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart; `ticks` are (y, label), `spans` are (middle x, label) of each stage.

    `names` are those of its curves if one stage has several: the n-th is drawn in color and dash n.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    num_left_out: int
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    spans: tuple[tuple[float, str], ...]
    logarithmic: bool


def draw_panels(metrics: Mapping[str, Mapping[str, np.ndarray]]) -> list[Panel]:
    """All charts that have something to show; `metrics` are columns by stage, NaN where a line lacks one."""
    metrics = {stage: columns for stage, columns in metrics.items() if columns}
    panels = (draw_panel(chart, metrics) for chart in CHARTS)
    return [panel for panel in panels if panel is not None]


def draw_panel(chart: Chart, metrics: Mapping[str, Mapping[str, np.ndarray]]) -> Panel | None:
    """The curves of one panel, the stages side by side in equal width, on one vertical axis."""
    found = find_names(chart, metrics)
    names = found[:MAX_CURVES]
    bins = {(stage, name): _bin(columns["step"], columns[name])
            for stage, columns in metrics.items() for name in names if name in columns}
    if not bins:
        return None
    scale, bottom, top = _choose_scale([band for _, *bands in bins.values() for band in bands],
                                       from_zero=chart.from_zero)
    place = lambda value: BOTTOM - (BOTTOM - TOP) * (scale(value) - bottom) / (top - bottom)

    gap = min(GAP, (RIGHT - LEFT) / (4 * len(metrics)))
    width = (RIGHT - LEFT - gap * (len(metrics) - 1)) / len(metrics)
    curves, spans = [], []
    for index, (stage, columns) in enumerate(metrics.items()):
        start, last = LEFT + index * (width + gap), float(columns["step"][-1])
        spans.append((start + width / 2, _label(stage, last + 1, width)))
        for number, name in enumerate(names):
            if (stage, name) not in bins:
                continue
            steps, *values = bins[stage, name]
            x = start + width * steps / max(last, 1.0)
            if len(x) == 1:     # a line of its own, so that it is seen
                x = np.clip(x + [-2.0, 2.0], start, start + width)
                values = [np.repeat(value, 2) for value in values]
            means, lows, highs = ([*map(place, value)] for value in values)
            band = f"{_points(x, highs)} {_points(x[::-1], lows[::-1])}"
            color, dash = (number, number % 3) if len(names) > 1 else (index, 0)
            curves.append(Curve(_shorten(name), stage, color, dash, _points(x, means), band))
    logarithmic = scale is math.log10
    limits = [10**bottom, 10**top] if logarithmic else [bottom, top]
    ticks = tuple((place(value), format_short(value))
                  for value in choose_ticks(*limits, logarithmic=logarithmic))
    return Panel(chart.title, chart.unit, tuple(map(_shorten, names)) if len(names) > 1 else (),
                 len(found) - len(names), tuple(curves), ticks, tuple(spans), logarithmic)


def find_names(chart: Chart, metrics: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The metrics of a chart that some stage has, in the chart's order, then by name."""
    present = sorted({name for columns in metrics.values() for name in columns})
    return [name for wanted in chart.names for name in present
            if name == wanted or wanted.endswith("/") and name.startswith(wanted)]


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
    """A tick's label: 0.25, 12k, 3M, 1.5e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _choose_scale(bands: Sequence[np.ndarray], *, from_zero: bool) -> tuple[Any, float, float]:
    """(log10 or float, and the scaled values at the lower and the upper edge)."""
    low = float(min(band.min() for band in bands))
    high = float(max(band.max() for band in bands))
    scale = math.log10 if not from_zero and low > 0 and high > 20 * low else float
    bottom = min(low, 0.0) if from_zero else scale(low)
    # Of numbers that differ in their last bits alone the difference is too small to be added.
    padding = max(0.06 * (scale(high) - bottom), 1e-9 * abs(bottom)) or 1.0
    if scale(high) == bottom:
        padding = abs(bottom) or 1.0
    return scale, bottom - padding * (not from_zero), scale(high) + padding


def _bin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(middle step, mean, least, largest) of at most NUM_BINS runs of lines, each [bins]."""
    known = np.isfinite(values)
    steps, values = steps[known], np.clip(values[known], -LARGEST, LARGEST)
    values = np.where(np.abs(values) < SMALLEST, 0.0, values)
    chunks = min(NUM_BINS, len(steps))
    parts = zip(np.array_split(steps, chunks), np.array_split(values, chunks), strict=True)
    table = [(step.mean(), value.mean(), value.min(), value.max()) for step, value in parts]
    return tuple(np.array(table).T)


def _points(x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in zip(x, y, strict=True))


def _shorten(name: str) -> str:
    return name.removeprefix("fill_").split("/", 1)[-1][:60]


def _label(stage: str, steps: float, width: float) -> str:
    """As much of a stage's name and its steps as finds room."""
    room, full = int(width / LETTER_WIDTH), f"{stage}: {steps:,.0f} steps"
    if len(full) <= room:
        return full
    return stage if len(stage) <= room else f"{stage[:room - 1]}\N{HORIZONTAL ELLIPSIS}" if room > 2 else ""
