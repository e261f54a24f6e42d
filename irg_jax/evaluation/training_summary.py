"""A training in numbers and rows: what `report.json`, the page's sections and the terminal tell of it."""

import base64
import collections
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from irg_jax.evaluation.files import is_count
from irg_jax.evaluation.training_log import Stage

MAX_PARTS = 12         # of a bar; what is beyond is drawn as one
MAX_EVENTS = 50        # rows
MAX_KINDS = 12         # of events, counted by name
MAX_ROWS = 1000        # of the config
MAX_DEPTH = 12
BAR_WIDTH = 600.0


def summarize_files(stage: Stage) -> dict[str, Any]:
    """What `report.json` holds of a stage beside its curves; None is what its files do not say."""
    total = (stage.config or {}).get("total_steps")
    return {"total_steps": total if is_count(total) else None,
            "skipped_steps": count_up(stage.metrics.get("skipped_steps")),
            "bad_records": count_up(stage.metrics.get("bad_records")),
            "goodput": stage.goodput and stage.goodput.share,
            "starts": stage.goodput and stage.goodput.starts,
            "seconds": dict(stage.goodput.seconds) if stage.goodput else None,
            "events": dict(collections.Counter(event.event for event in stage.events)),
            "samples": [sample.step for sample in stage.samples]}


def count_up(counter: np.ndarray | None) -> int | None:
    """The last value of a counter that every start of a run may begin anew.

        0 0 2 2 | 0 1   ->  3
    """
    if counter is None:
        return None
    values = counter[np.isfinite(counter)]
    before = np.concatenate([[0.0], values[:-1]])
    return int(np.where(values >= before, values - before, values).sum())


def show_samples(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Per stage that has any: its pictures as data URIs, with step and texts."""
    return [{"name": stage.name, "count": stage.num_samples, "pictures": [
                {"step": sample.step, "texts": sample.texts,
                 "image": f"data:image/png;base64,{base64.b64encode(sample.image).decode('ascii')}"}
                for sample in stage.samples]}
            for stage in stages if stage.samples]


def show_goodput(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Per stage that has it: the parts of its bar, training first, then the longest. One color a name."""
    colors: dict[str, int] = {}
    bars = []
    for stage in stages:
        if not stage.goodput or not stage.goodput.seconds:
            continue
        seconds = sorted(stage.goodput.seconds.items(), key=lambda item: (item[0] != "training", -item[1]))
        if len(seconds) > MAX_PARTS:
            rest = sum(value for _, value in seconds[MAX_PARTS - 1:])
            seconds = [*seconds[:MAX_PARTS - 1], (f"{len(seconds) - MAX_PARTS + 1} others", rest)]
        total = sum(value for _, value in seconds)
        parts, left = [], 0.0
        for name, value in seconds:
            share = value / total if total else 0.0
            color = colors.setdefault(name, len(colors))
            parts.append({"name": name, "seconds": value, "share": share, "color": color,
                          "x": BAR_WIDTH * left, "width": BAR_WIDTH * share})
            left += share
        bars.append({"name": stage.name, "share": stage.goodput.share, "starts": stage.goodput.starts,
                     "total": total, "parts": parts})
    return bars


def show_events(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Per stage that has any: its last MAX_EVENTS events, and how many of each kind there are."""
    return [{"name": stage.name, "left_out": max(0, len(stage.events) - MAX_EVENTS),
             "kinds": collections.Counter(event.event for event in stage.events).most_common(MAX_KINDS),
             "rows": [{"time": _format_time(event.time), "step": event.step, "event": event.event,
                       "text": event.text} for event in stage.events[-MAX_EVENTS:]]}
            for stage in stages if stage.events]


def compare_configs(stages: Sequence[Stage]) -> dict[str, Any]:
    """One row a field, one value a stage (None: it has no such field), and whether they differ."""
    configs = {stage.name: flatten(stage.config) for stage in stages if stage.config is not None}
    rows = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = [config.get(key) for config in configs.values()]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    return {"stages": list(configs), "rows": rows[:MAX_ROWS], "left_out": max(0, len(rows) - MAX_ROWS),
            "differing": sum(row["differs"] for row in rows)}


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Values as JSON by dotted name; a list of plain values is one value.

        {"data": {"groups": [{"name": "a"}]}, "betas": [0.9, 0.95]}
        ->  {"data.groups.0.name": '"a"', "betas": "[0.9, 0.95]"}
    """
    flat: dict[str, str] = {}

    def add(value: Any, path: tuple[str, ...]) -> None:
        items = (value.items() if isinstance(value, dict)
                 else list(enumerate(value)) if isinstance(value, list) else ())
        is_plain = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
        if not items or is_plain or len(path) > MAX_DEPTH:
            flat[".".join(path)] = json.dumps(value, ensure_ascii=False)
            return
        for name, item in items:
            add(item, (*path, str(name)))
    for name, value in config.items():
        add(value, (name,))
    return flat


def format_stages(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The stages as aligned text.

                steps            loss    ce      mse      tokens/s   goodput   skipped   bad records
        stage1  400 of 4,000     0.512   0.498   0.0141   3,210      93 %      0         -
    """
    rows = [["", "steps", "loss", "ce", "mse", "tokens/s", "goodput", "skipped", "bad records"]]
    for name, summary in summaries.items():
        steps = f"{summary['steps']:,}"
        if summary["total_steps"] is not None:
            steps += f" of {summary['total_steps']:,}"
        cells = [("loss", "{:.3f}"), ("ce", "{:.3f}"), ("mse", "{:.4f}"), ("tokens_per_second", "{:,.0f}"),
                 ("goodput", "{:.0%}"), ("skipped_steps", "{:,}"), ("bad_records", "{:,}")]
        rows.append([name, steps, *("-" if summary[key] is None else form.format(summary[key])
                                    for key, form in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
