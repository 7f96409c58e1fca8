"""The results of a drop-in evaluation: a table, a JSON file and a picture."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

LABELS = {"acc": "accuracy", "f1": "macro-F1", "cosine": "cosine", "moved": "moved", "spearman": "rank correlation"}
COSTS = {"kept": "kept (pairs kept / visible)", "compute": "compute (attention MACs / dense)"}


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `dropin.json`: one entry for each setting, non-finite numbers as null."""
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    (folder / "dropin.json").write_text(json.dumps(plain, indent=1) + "\n")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> None:
    """Print a table of all settings."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    table = Table()
    table.add_column("attention", no_wrap=True)
    table.add_column("setting", no_wrap=True)
    columns = ["kept", "compute", *measures]
    for name in columns:
        table.add_column(LABELS.get(name, name), justify="right")
    for i, row in enumerate(rows):
        values = [f"{row[name]:.2e}" if name == "moved" and row[name] else f"{row[name]:.4f}" for name in columns]
        last = i + 1 == len(rows) or rows[i + 1]["attention"] != row["attention"]
        knobs = ", ".join(f"{knob} {value}" for knob, value in row["setting"].items())
        table.add_row(row["attention"], knobs, *values, end_section=last)
    console.print(table)


def draw_rows(path: Path, rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> None:
    """Draw each measure against the kept share and the compute, a line for each mechanism."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["attention"] for row in rows))
    size = (10, 3.2 * len(measures) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(measures), len(COSTS), sharey="row", squeeze=False)
    for line, measure in zip(axes, measures, strict=True):
        for axis, (cost, label) in zip(line, COSTS.items(), strict=True):
            for i, name in enumerate(names):
                points = sorted((row[cost], row[measure]) for row in rows if row["attention"] == name)
                style = {"color": f"C{i}", "label": name, "markersize": 4, "linewidth": 1}
                axis.plot(*zip(*points, strict=True), marker="*" if name == "dense" else "o", **style)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(LABELS.get(measure, measure))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path)
