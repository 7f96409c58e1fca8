"""The outcome of a run, read from its folder: exit code, objectives, last output, and values by epoch."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_CODE = "exit_code"
OUTPUT = "output.log"


@dataclass(frozen=True)
class Outcome:
    """The values of a trial's objectives, or the reason why there are none."""

    values: tuple[float, ...] | None
    reason: str = ""


def read_exit_code(folder: Path) -> int | None:
    """Read the exit code of the run in a folder; None while there is none."""
    try:
        return int((folder / EXIT_CODE).read_text())
    except (OSError, ValueError):
        return None


def read_outcome(folder: Path, objectives: Sequence[str]) -> Outcome:
    """Read the objectives of a trial that has ended."""
    code = read_exit_code(folder)
    if code is None:
        return Outcome(None, _add_output("killed, it left no exit code", folder))
    if code != 0:
        return Outcome(None, _add_output(f"exit code {code}", folder))
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError) as error:
        return Outcome(None, _add_output(f"exit code 0, but metrics.json cannot be read ({error})", folder))
    if not isinstance(metrics, dict):
        return Outcome(None, "exit code 0, but metrics.json holds no metrics by name")
    values = []
    for name in objectives:
        if name not in metrics:
            return Outcome(None, f"metrics.json has no {name}. It has: {', '.join(sorted(metrics)) or 'nothing'}")
        value = metrics[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return Outcome(None, f"{name} is {value}, not a finite number")
        values.append(float(value))
    return Outcome(tuple(values))


def read_last_words(folder: Path, lines: int = 8, width: int = 300) -> str:
    """Read the last lines that a trial printed."""
    return "\n".join(line[-width:] for line in read_last_lines(folder / OUTPUT, lines))


def read_last_lines(path: Path, count: int) -> list[str]:
    """Read the last non-blank lines of a log; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-count:]


def read_curve(folder: Path, monitor: Sequence[str]) -> dict[int, tuple[float, ...]]:
    """Read the values of some columns by epoch, from the CSV log of a training that may still run."""
    curve = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    curve[int(float(row["epoch"]))] = tuple(float(row[name]) for name in monitor)
                except (KeyError, ValueError, TypeError):
                    continue  # a row of other metrics, or one being written
    return {epoch: values for epoch, values in curve.items() if all(map(math.isfinite, values))}


def _add_output(reason: str, folder: Path) -> str:
    output = read_last_words(folder)
    return f"{reason}; its last output:\n{output}" if output else f"{reason}; it printed nothing"
