"""Summaries of rows: the length from which a contender is faster, and the growth of its time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]
USUAL_DTYPE = "float32"
SPEEDUPS = {"speedup_fwd": "forward", "speedup_fwd_bwd": "forward + backward", "speedup_step": "training step"}


class Curve(NamedTuple):
    """What rows have in common that differ only in length."""

    mechanism: str
    setting: str
    backend: str
    dtype: str
    pattern: str
    model: str

    def __str__(self) -> str:
        """Name it; the usual type, float32, goes without saying."""
        shown = self._replace(
            setting=f"({self.setting})" if self.setting else "",
            dtype="" if self.dtype == USUAL_DTYPE else self.dtype,
        )
        return " ".join(word for word in shown if word)


def group_curves(records: Sequence[Record]) -> dict[Curve, list[Record]]:
    """Group the timed rows that differ only in length, shortest first."""
    grouped: dict[Curve, list[Record]] = {}
    for record in records:
        if record["fwd_ms"] is not None:
            curve = Curve(*(str(record[name] or "") for name in Curve._fields))
            grouped.setdefault(curve, []).append(record)
    return {curve: sorted(rows, key=lambda r: int(r["n"])) for curve, rows in grouped.items()}


def find_crossover(lengths: Sequence[int], speedups: Sequence[float]) -> int | None:
    """Find the shortest measured length from which every measured speed-up is above 1; None if there is none."""
    first = None
    for n, speedup in zip(lengths, speedups, strict=True):
        if speedup <= 1:
            first = None
        elif first is None:
            first = n
    return first


def describe_speed(rows: Sequence[Record], measure: str) -> str | None:
    """Describe by one measure from which length rows are faster; None where it was not measured."""
    seen = [(int(r["n"]), float(r[measure])) for r in rows if r[measure] is not None]
    if not seen:
        return None
    lengths, speedups = zip(*seen, strict=True)
    best = f"{max(speedups):.2f} at N {lengths[speedups.index(max(speedups))]}"
    where = find_crossover(lengths, speedups)
    if where is not None:
        return f"faster from N {where} on" + (
            f" (all that was measured, best {best})" if where == lengths[0] else f" (best {best})"
        )
    wins = [n for n, speedup in seen if speedup > 1]
    if wins:
        return f"faster at N {', '.join(map(str, wins))}, but slower at N {lengths[-1]} (best {best})"
    return f"slower here at every N measured (best {best})"


def describe_crossovers(records: Sequence[Record]) -> list[str]:
    """Describe the speed of each contender in each pattern, in a line each."""
    lines = []
    for curve, rows in group_curves(records).items():
        said = [f"{word}: {v}" for m, word in SPEEDUPS.items() if (v := describe_speed(rows, m)) is not None]
        lines.append(f"{curve}: {'; '.join(said)}")
    return lines


def fit_exponent(lengths: Sequence[float], times: Sequence[float]) -> float | None:
    """Fit time = c N^e by least squares in logarithms; return e, or None for fewer than two lengths."""
    if len(set(lengths)) < 2:
        return None
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
