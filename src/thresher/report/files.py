"""The report as data: front.json with the fronts, runs.csv with one line for each run."""

import csv
import json
from pathlib import Path
from typing import Any

from thresher.report.settings import AXES, Setting, Spread, axis_of, lower_is_better
from thresher.report.summary import Summary, key_label, shown


def write_front(summary: Summary, path: Path) -> None:
    """Write the fronts of every task, metric and axis, with the runs and the commands behind each point."""
    fronts = []
    for front in summary.fronts:
        points = [(summary.settings[place], place) for place in front.places]
        fronts.append(
            {
                "task": front.task,
                "metric": front.metric,
                "better": "lower" if lower_is_better(front.metric) else "higher",
                "axis": axis_of(front.metric, front.axis),
                "points": [_point(summary, setting, place, front.metric) for setting, place in points],
            }
        )
    counts = {"runs": len(summary.runs), "settings": len(summary.settings), "failed": len(summary.failed)}
    counts["running"] = len(summary.running)
    path.write_text(json.dumps({"counts": counts, "fronts": fronts}, indent=1) + "\n")


def _point(summary: Summary, setting: Setting, place: int, metric: str) -> dict[str, Any]:
    twin = summary.twins.get(place)
    return {
        "attention": setting.mechanism,
        "evaluation": setting.evaluation,
        "differs_in": {
            key_label(key): shown(key, setting.config[key])
            for key in summary.columns[setting.task]
            if key in setting.config
        },
        metric: _spread(setting.spread(metric)),
        **{axis_of(metric, axis): _spread(setting.spread(axis_of(metric, axis))) for axis in AXES},
        "train/seconds": _spread(setting.spread("train/seconds")),
        "dense_twin": None if twin is None else _spread(summary.settings[twin].spread(metric)),
        "runs": [
            {"run": run.name, "seed": run.config.get("seed"), "command": summary.command(run)} for run in setting.runs
        ],
    }


def _spread(spread: Spread | None) -> dict[str, float | int | None] | None:
    return None if spread is None else spread._asdict()


def write_runs(summary: Summary, path: Path) -> None:
    """Write one line for each run: how it ended, its metrics, the keys that differ, and its command."""
    metrics = sorted({name for run in summary.runs for name in run.metrics if name.startswith(("test/", "val/"))})
    keys = list(dict.fromkeys(key for columns in summary.columns.values() for key in columns))
    head = ["run", "status", "reason", "attention", "evaluation", "seed", "train/seconds", *metrics]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, *map(key_label, keys), "command"])
        for run in summary.runs:
            status = "running" if run.running else "failed" if run.problem else "finished"
            row: list[Any] = [run.name, status, run.problem, run.mechanism]
            row += [run.evaluation, run.config.get("seed")]
            row += [run.metrics.get(name) for name in ("train/seconds", *metrics)]
            row += [shown(key, run.config[key]) if key in run.config else None for key in keys]
            writer.writerow([*row, summary.command(run)])
