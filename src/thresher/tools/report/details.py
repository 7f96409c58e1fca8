"""The details of a run: its data, threshold and kept of each head, and curves over training."""

import csv
import json
from pathlib import Path
from typing import Any

from thresher.results.runs import Run
from thresher.tools.report.summary import Summary

POINTS = 150  # of a curve
VALUES = 6000  # of all heads of a run


def choose_runs(summary: Summary, limit: int) -> list[int]:
    """Choose the runs to show in detail, by place: those on fronts, then dense ones, then the others in their order."""
    place = {id(run): i for i, run in enumerate(summary.runs)}
    on_front = {setting for front in summary.fronts for setting in front.places}
    ranked = sorted(
        range(len(summary.settings)),
        key=lambda i: (i not in on_front, summary.settings[i].mechanism != "dense", i),
    )
    runs = [place[id(run)] for i in ranked for run in summary.settings[i].runs]
    runs += [place[id(run)] for run in (*summary.running, *summary.stopped, *summary.failed)]
    return sorted(runs[:limit])


def read_details(run: Run) -> dict[str, Any]:
    """Read data, heads and curves of a run; leave out files that are missing or damaged."""
    return {
        "data": _read_data(run.folder / "data.json"),
        "heads": _read_heads(run.folder / "heads.json"),
        "curves": _read_all_curves(run.folder),
    }


def _read_data(path: Path) -> list[list[str]] | None:
    """Read the name and the description of each part of the data."""
    try:
        parts = [(str(part["name"]), str(part["line"])) for part in json.loads(path.read_text())["parts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [[name, line.removeprefix(f"{name}: ")] for name, line in parts]


def _read_heads(path: Path) -> dict[str, Any] | None:
    try:
        layers = json.loads(path.read_text())["layers"]
        names = [str(layer["name"]) for layer in layers]
        kept, thresholds = (
            [[_round(head[key]) for head in layer["heads"]] for layer in layers] for key in ("kept", "threshold")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    trained = any(value is not None for row in thresholds for value in row)
    return {"layers": names, "kept": kept, "threshold": thresholds if trained else None}


def _read_all_curves(folder: Path) -> dict[str, Any]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv")):
        _read_curves(path, curves)
    heads = sum(name.startswith("heads/") for name in curves)
    most = {True: max(2, min(POINTS, VALUES // max(heads, 1))), False: POINTS}
    return {name: _thin(*curve, most[name.startswith("heads/")]) for name, curve in curves.items()}


def _read_curves(path: Path, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        head = next(rows, [])
        if "step" not in head:
            return
        step = head.index("step")
        wanted = [(i, name) for i, name in enumerate(head) if _is_plotted(name)]
        for row in rows:
            if len(row) < len(head):
                continue  # still being written
            for i, name in wanted:
                if row[i]:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(float(row[step])))
                    values.append(float(row[i]))


def _is_plotted(name: str) -> bool:
    kind, _, rest = name.partition("/")
    if kind == "heads":
        return rest.endswith("/threshold")
    return kind in ("train", "val") and rest not in ("compute_loss", "gap", "score")


def _thin(steps: list[int], values: list[float], most: int) -> list[list[Any]]:
    last = len(steps) - 1
    chosen = range(len(steps)) if last < most else sorted({round(i * last / (most - 1)) for i in range(most)})
    return [[steps[i] for i in chosen], [_round(values[i]) for i in chosen]]


def _round(value: float | None) -> float | None:
    if value is None or not abs(value) < float("inf"):
        return None
    return float(f"{value:.4g}")
