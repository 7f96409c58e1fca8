"""What a trial left in its folder: exit code, objectives, last words, and values over the epochs."""

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
    """How a trial ended: with values, or with a reason for there being none."""

    values: tuple[float, ...] | None
    reason: str = ""


def exit_code(folder: Path) -> int | None:
    """Return the exit code of the trial in a folder, None while there is none."""
    try:
        return int((folder / EXIT_CODE).read_text())
    except (OSError, ValueError):
        return None


def read_outcome(folder: Path, objectives: Sequence[str]) -> Outcome:
    """Judge a trial that has ended."""
    code = exit_code(folder)
    if code is None:
        return Outcome(None, _with_output("killed, it left no exit code", folder))
    if code != 0:
        return Outcome(None, _with_output(f"exit code {code}", folder))
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError) as error:
        return Outcome(None, _with_output(f"exit code 0, but metrics.json cannot be read ({error})", folder))
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


def last_words(folder: Path, lines: int = 8, width: int = 300) -> str:
    """Return the last lines that a trial printed."""
    return "\n".join(line[-width:] for line in last_lines(folder / OUTPUT, lines))


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log that are not blank; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-count:]


def read_curve(folder: Path, monitor: Sequence[str]) -> dict[int, tuple[float, ...]]:
    """Return the values of the monitored columns by epoch, from the CSV log of a training that may still go on."""
    curve = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    curve[int(float(row["epoch"]))] = tuple(float(row[name]) for name in monitor)
                except (KeyError, ValueError, TypeError):
                    continue  # a row of other metrics, or one that is being written
    return {epoch: values for epoch, values in curve.items() if all(map(math.isfinite, values))}


def _with_output(reason: str, folder: Path) -> str:
    words = last_words(folder)
    return f"{reason}; it printed last:\n{words}" if words else f"{reason}; it printed nothing"
