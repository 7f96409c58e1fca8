"""The report as files: front.json with the fronts, runs.csv with one line for each run."""

import csv
import json
from pathlib import Path
from typing import Any

from thresher.tools.report.settings import AXES, Setting, Spread, lower_is_better, name_axis
from thresher.tools.report.summary import Summary, format_key, format_value


def write_front(summary: Summary, path: Path) -> None:
    """Write the front of every task, metric and axis, with the runs and commands behind each point."""
    fronts = []
    for front in summary.fronts:
        points = [(summary.settings[place], place) for place in front.places]
        fronts.append(
            {
                "task": front.task,
                "metric": front.metric,
                "better": "lower" if lower_is_better(front.metric) else "higher",
                "axis": name_axis(front.metric, front.axis),
                "differs_in_training": summary.training_differences[front.task],
                "points": [_point(summary, setting, place, front.metric) for setting, place in points],
            }
        )
    counts = {"runs": len(summary.runs), "settings": len(summary.settings), "failed": len(summary.failed)}
    counts |= {"running": len(summary.running), "stopped": len(summary.stopped)}
    path.write_text(json.dumps({"counts": counts, "fronts": fronts}, indent=1) + "\n")


def _point(summary: Summary, setting: Setting, place: int, metric: str) -> dict[str, Any]:
    twin = summary.twins.get(place)
    return {
        "attention": setting.mechanism,
        "evaluation": setting.evaluation,
        "differs_in": {
            format_key(key): format_value(key, setting.config[key])
            for key in summary.columns[setting.task]
            if key in setting.config
        },
        metric: _spread(setting.spread(metric)),
        **{name_axis(metric, axis): _spread(setting.spread(name_axis(metric, axis))) for axis in AXES},
        "train/seconds": _spread(setting.spread("train/seconds")),
        "dense_twin": None if twin is None else _spread(summary.settings[twin].spread(metric)),
        "runs": [
            {"run": run.name, "seed": run.config.get("seed"), "command": summary.command(run)} for run in setting.runs
        ],
    }


def _spread(spread: Spread | None) -> dict[str, float | int | None] | None:
    return None if spread is None else spread._asdict()


def write_runs(summary: Summary, path: Path) -> None:
    """Write one line for each run: status, metrics, the keys in which settings differ, and the command."""
    metrics = sorted({name for run in summary.runs for name in run.metrics if name.startswith(("test/", "val/"))})
    keys = list(dict.fromkeys(key for columns in summary.columns.values() for key in columns))
    head = ["run", "status", "reason", "attention", "evaluation", "seed", "train/seconds", *metrics]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, *map(format_key, keys), "command"])
        for run in summary.runs:
            row: list[Any] = [run.name, run.status, run.problem, run.mechanism]
            row += [run.evaluation, run.config.get("seed")]
            row += [run.metrics.get(name) for name in ("train/seconds", *metrics)]
            row += [format_value(key, run.config[key]) if key in run.config else None for key in keys]
            writer.writerow([*row, summary.command(run)])
