"""Evaluated folders beside each other, and beside what was published.

    python -m irg_jax.evaluate compare RUN ... --out DIR [--judge URL --judge_model MODEL]

DIR/compare.html   tables, and the prompts on which two models differ most, images side by side; one file
DIR/compare.md     the tables alone
DIR/compare.json   the same as data

With a judge, every pair of first and last turn is shown to it in both orders: how often is the last preferred?
"""

import argparse
import base64
import collections
import io
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from data_pipelines.digests import write_json, write_text
from data_pipelines.endpoints import Endpoint
from data_pipelines.images import read_image
from irg_jax.evaluation.benchmarks import judging
from irg_jax.evaluation.benchmarks.protocol import Prompt
from irg_jax.evaluation.entries import Entry, read_entry
from irg_jax.evaluation.intervals import Group, score_columns, tell_score
from irg_jax.evaluation.published import PUBLISHED

SHOWN_SIDE = 320    # of an image on the page, in pixels


def main(arguments: Sequence[str]) -> int:
    """Writes the three files, prints the tables; 1 and a sentence if a folder is not sound."""
    flags = _parse(arguments)
    try:
        entries = [read_entry(run, label) for run, label in zip(flags.runs, _labels(flags.runs))]
        preferences = {}
        if flags.judge:
            endpoint = judging.connect(flags, flags.out / "answers")
            template = judging.load_template("preference", flags.judge_prompt)
            preferences = {entry.label: ask_preference(entry, endpoint, template) for entry in entries
                           if len(entry.systems) > 1}
            print(judging.note_usage(endpoint, flags.out / "usage.json"))
        sections = [make_section(group, flags.gallery) for group in _by_benchmark(entries)]
        write_json(flags.out / "compare.json", {
            "benchmarks": [{name: value for name, value in section.items() if name != "gallery"}
                           for section in sections], "preferences": preferences})
        text = format_markdown(sections, preferences)
        write_text(flags.out / "compare.md", text)
        write_text(flags.out / "compare.html", render(sections, preferences))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    print(f"page: {flags.out / 'compare.html'}")
    return 0


def make_section(entries: Sequence[Entry], gallery: int) -> dict[str, Any]:
    """The table of one benchmark, and the prompts that two of its rows differ on most."""
    published = PUBLISHED.get(entries[0].benchmark)
    is_percent = entries[0].benchmark[0] == "tiif"    # as the paper prints it
    unit = 100 if is_percent else 1
    rows = [{"name": name, "is_published": True, "is_difference": False,
             "scores": {column: {"mean": mean / unit, "ci95": None} for column, mean in scores.items()}}
            for name, scores in (published.rows.items() if published else ())]
    for entry in entries:
        rows += [{"name": f"{entry.label}, {system}", "is_published": False, "is_difference": False,
                  "scores": scores} for system, scores in entry.table.items()]
        if entry.difference:
            rows.append({"name": f"{entry.label}, {entry.systems[-1]} - {entry.systems[0]}",
                         "is_published": False, "is_difference": True, "scores": entry.difference})
    for row in rows:
        row["told"] = {column: tell_score(score, is_percent=is_percent, is_difference=row["is_difference"])
                       for column, score in row["scores"].items()}
    known = [column for row in rows for column in row["scores"]]
    columns = sorted(dict.fromkeys(known), key=lambda column: not column.startswith("overall"))
    facts = {entry.label: entry.facts for entry in entries}
    return {"benchmark": entries[0].benchmark[0], "version": entries[0].benchmark[1], "columns": columns,
            "rows": rows, "note": published.note if published else "",
            "facts": facts, "gallery": _choose_gallery(entries, gallery)}


def ask_preference(entry: Entry, endpoint: Endpoint, template: judging.Template) -> dict[str, Any]:
    """How often a judge prefers a run's last turn to its first, each pair shown in both orders."""
    first, last = (entry.pictures[system] for system in (entry.systems[0], entry.systems[-1]))
    names = [name for name in entry.texts if name in first and name in last]
    if not names:
        raise ValueError(f"{entry.label}: holds no images of {entry.systems[0]} and {entry.systems[-1]}; "
                         "restore its folder samples")
    found = judging.prefer([(Prompt(name, "", entry.texts[name]), first[name], last[name]) for name in names],
                           endpoint, template)
    known = np.array([value for value in found if value is not None])
    if not len(known):
        raise ValueError(f"{endpoint.config.model} gave no readable answer on any pair; ask another judge")
    column = score_columns({"all": Group(known[None], np.ones(len(known)))}, {"all": {"all": 1.0}})["all"]
    has_ends = not np.isnan(column.low[0])
    return {"of": entry.systems[-1], "against": entry.systems[0], "pairs": len(known),
            "share": float(column.mean[0]),
            "ci95": [float(column.low[0]), float(column.high[0])] if has_ends else None,
            "by_place": int((known == 0.5).sum()), "unanswered": len(found) - len(known),
            "judge": judging.describe(endpoint, template)}


def format_markdown(sections: Sequence[Mapping[str, Any]], preferences: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = []
    for section in sections:
        lines += [f"## {section['benchmark']} ({section['version']})", "",
                  f"| | {' | '.join(section['columns'])} |", f"|---|{'---|' * len(section['columns'])}"]
        for row in section["rows"]:
            cells = [row["told"].get(column, "") for column in section["columns"]]
            name = f"{row['name']}{' (published)' if row['is_published'] else ''}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", *([f"Published: {section['note']}."] if section["note"] else [])]
        lines += [f"{label}: {'; '.join(f'{name} {value}' for name, value in facts.items())}."
                  for label, facts in section["facts"].items()] + [""]
    lines += [f"{label}: {tell_preference(each)}" for label, each in preferences.items()]
    return "\n".join(lines).rstrip() + "\n"


def tell_preference(found: Mapping[str, Any]) -> str:
    """One sentence on a judge's preference."""
    ends = f" [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]" if found["ci95"] else ""
    return (f"{found['judge']['model']} prefers {found['of']} to {found['against']} in "
            f"{found['share']:.3f}{ends} of {found['pairs']} pairs, each shown in both orders; in "
            f"{found['by_place']} it chose a place rather than an image (half a point), on "
            f"{found['unanswered']} it gave no readable answer.")


def render(sections: Sequence[Mapping[str, Any]], preferences: Mapping[str, Any]) -> str:
    """The page as HTML: one file, no script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("compare.html.j2").render(
        sections=sections, preferences={label: tell_preference(found) for label, found in preferences.items()})


def _choose_gallery(entries: Sequence[Entry], size: int) -> dict[str, Any] | None:
    """The last turns of the first and the last run, or of one run its first and its last system."""
    one, other = (entries[0], entries[-1])
    sides = [(one, one.systems[-1] if len(entries) > 1 else one.systems[0]), (other, other.systems[-1])]
    shares = [entry.by_prompt.get(system, {}) for entry, system in sides]
    shown = [entry.pictures[system] for entry, system in sides]
    both = [name for name in shares[0] if name in shares[1] and name in shown[0] and name in shown[1]
            and one.texts.get(name) == other.texts.get(name)]
    if sides[0] == sides[1] or not both:
        return None
    both.sort(key=lambda name: (-abs(shares[1][name] - shares[0][name]), name))
    return {"names": [f"{entry.label}, {system}" for entry, system in sides],
            "prompts": [{"text": one.texts[name], "shares": [share[name] for share in shares],
                         "images": [_embed(pictures[name]) for pictures in shown]} for name in both[:size]]}


def _embed(path: pathlib.Path) -> str:
    image = Image.fromarray(read_image(path))
    if max(image.size) > SHOWN_SIDE:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _by_benchmark(entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        groups[entry.benchmark].append(entry)
    return list(groups.values())


def _labels(runs: Sequence[pathlib.Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    resolved = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, resolved)) + 1):
        labels = ["/".join(parts[-length:]) for parts in resolved]
        if len(set(labels)) == len(labels):
            break
    return labels


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m irg_jax.evaluate compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=pathlib.Path,
                        help="an OUT of irg_jax.evaluate, RUN/eval/shapes for the miniature")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, required=True, help="folder of the files")
    parser.add_argument("--gallery", type=int, default=12, help="prompts shown of a benchmark (default: 12)")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible endpoint of a judge")
    parser.add_argument("--judge_model", help="the judge's name there")
    parser.add_argument("--judge_key", default="", metavar="VARIABLE", help="environment variable with its key")
    parser.add_argument("--judge_options", default=judging.OPTIONS, metavar="JSON",
                        help=f"fields of each request (default: {judging.OPTIONS})")
    parser.add_argument("--judge_prompt", metavar="FILE", help="other words for the judge than ours")
    parser.add_argument("--judge_concurrency", type=int, default=8, help="requests under way at once")
    parser.add_argument("--judge_prices", type=lambda text: text.split(","), default=["0", "0"],
                        metavar="IN,OUT", help="of a million tokens read, and written")
    parser.add_argument("--judge_budget", type=float, default=0.0, help="nothing is sent once so much is spent")
    return parser.parse_args(arguments)
