"""Writes a run's report: `report.json`, and `report.html` as one self-contained file.

A run may have any stages, finished or still going, and an evaluation or none.

    python -m irg_jax.report runs/shapes [--out DIR]
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from irg_jax.evaluation.page import render_page
from irg_jax.evaluation.results import SYSTEMS, read_run
from irg_jax.evaluation.statistics import DIFFERENCES, build_report
from irg_jax.evaluation.training_summary import format_stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads RUN, writes both files, prints the table or the stages; 1 and a sentence if it is not sound."""
    parser = argparse.ArgumentParser(prog="python -m irg_jax.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=pathlib.Path,
                        help="folder of a run, the --workdir of its trainings")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path,
                        help="where to write the two files (default: RUN)")
    flags = parser.parse_args(arguments)
    out = flags.out or flags.run
    try:
        run = read_run(flags.run)
        report = build_report(run)
        files = {"report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
                 "report.html": render_page(run, report)}
        # Both are complete before either is written, so that a fault leaves no new file behind.
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(out / name, text)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(format_table(report) if run.manifest else format_stages(report["stages"]))
    print(f"\nreport: {out / 'report.html'}")
    return 0


def format_table(report: Mapping[str, Any]) -> str:
    """Scores and differences as aligned text, one line for `overall` and one a category.

                    base  self_cot  turn1  turn2   turn2 - turn1          turn1 - base
        overall     0.42      0.45   0.58   0.66   +0.08 [+0.03, +0.13]   +0.16 [+0.10, +0.22]
    """
    headings = [name.replace("_minus_", " - ") for name in DIFFERENCES]
    rows = [["", *SYSTEMS, *headings]]
    for category in report["base"]:
        scores = [f"{report[system][category]:.2f}" for system in SYSTEMS]
        by_name = report if category == "overall" else {
            name: report["differences_by_category"][name][category] for name in DIFFERENCES}
        differences = [_format_difference(by_name[name]) for name in DIFFERENCES]
        rows.append([category.replace("_", " "), *scores, *differences])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<" + ">" * len(SYSTEMS) + "<" * len(DIFFERENCES)
    lines = ["   ".join(f"{cell:{align}{width}}" for cell, align, width
                        in zip(row, aligns, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"{report['prompts']} prompts; brackets: 95 % intervals, "
                      "paired bootstrap over prompts"])


def write_atomically(path: pathlib.Path, text: str) -> None:
    """A reader of `path` sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _format_difference(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    sys.exit(main())
