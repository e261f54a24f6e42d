"""Renders `report.html`: what is shown is chosen here, the page is `page.html.j2` and what that includes.

The page carries its images and curves in itself, runs no script and asks the network for nothing;
its own Content-Security-Policy says so too.
"""

import base64
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from irg_jax.evaluation.curves import draw_panels
from irg_jax.evaluation.drawing import split_sections
from irg_jax.evaluation.files import read_image
from irg_jax.evaluation.results import SYSTEMS, Result, Run
from irg_jax.evaluation.statistics import DIFFERENCES, OUTCOMES, align_verdicts, classify_outcomes
from irg_jax.evaluation.training_summary import compare_configs, show_events, show_goodput, show_samples

WHISKER_WIDTH = 108.0


def render_page(run: Run, report: Mapping[str, Any], *, gallery_size: int = 8) -> str:
    """The whole page as HTML; `gallery_size` trajectories are shown of each outcome of an evaluation."""
    folder = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["duration"] = format_duration
    evaluated = run.manifest is not None
    return environment.get_template("page.html.j2").render(
        report=report, systems=SYSTEMS, evaluated=evaluated, name=run.name,
        rows=_list_rows(report) if evaluated else [],
        gallery=choose_gallery(run.results, gallery_size) if evaluated else [],
        panels=draw_panels({stage.name: stage.metrics for stage in run.stages}),
        samples=show_samples(run.stages), goodput=show_goodput(run.stages),
        events=show_events(run.stages), config=compare_configs(run.stages), notes=run.notes)


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


def format_duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


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
