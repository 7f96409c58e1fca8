"""Targets: a column of some rows, and the value that it must reach."""

from collections.abc import Mapping, Sequence
from typing import Any

from thresher.tools.bench.records import FIELDS, MORE

DERIVED = ("growth_fwd", "growth_fwd_bwd", "map_share")
KEYS = {"where", "measure", "at_least", "at_most", "aim"}


def check_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError where a target names a column that no row has."""
    for target in targets:
        if unknown := target.keys() - KEYS:
            raise ValueError(
                f"targets: {', '.join(unknown)} is no key of a target; there are: {', '.join(sorted(KEYS))}"
            )
        if target.get("measure") not in (*FIELDS, *MORE, *DERIVED):
            raise ValueError(f"targets: no row has a {target.get('measure')!r}; derived: {', '.join(DERIVED)}")
        if ("at_least" in target) == ("at_most" in target):
            raise ValueError(f"targets: {target['measure']} needs either at_least or at_most")
        if unknown := target.get("where", {}).keys() - {*FIELDS, *MORE}:
            raise ValueError(f"targets: no row has a {', '.join(unknown)}")


def compare_targets(targets: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare targets with rows; return each with `measured` and `verdict`: met, aim met, missed or not measured."""
    results = []
    for target in targets:
        where = target.get("where", {})
        rows = [r for r in records if all(r[key] == value for key, value in where.items())]
        values = [v for row in rows if (v := find_value(row, target["measure"], records)) is not None]
        least = "at_least" in target
        value = (min if least else max)(values) if values else None
        results.append({**target, "measured": value, "verdict": _decide(target, value, least)})
    return results


def find_value(row: Mapping[str, Any], name: str, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Find the value of a column of a row, or compute a derived one.

    `growth_fwd` and `growth_fwd_bwd` are the times at this length over those at half of it; `map_share` is the peak
    memory over that of one fp32 number for each pair of tokens, head and example.
    """
    if name == "map_share":
        whole = row["batch"] * row["heads"] * row["n"] ** 2 * 4 / 2**20
        return None if row["peak_mb"] is None else row["peak_mb"] / whole
    if name in DERIVED:
        half = [r for r in records if _differ_only_in_length(r, row) and 2 * r["n"] == row["n"]]
        times = [_find_time(r, name) for r in (row, *half[:1])]
        return None if len(times) < 2 or None in times else times[0] / times[1]  # type: ignore[operator]
    value = row[name]
    return None if value is None else float(value)


def _differ_only_in_length(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("mechanism", "setting", "backend", "pattern", "model", "dtype"))


def _find_time(row: Mapping[str, Any], name: str) -> float | None:
    if name == "growth_fwd":
        forward: float | None = row["fwd_ms"]
        return forward
    parts = (row["train_fwd_ms"], row["bwd_ms"])
    return None if None in parts else sum(parts)


def _decide(target: Mapping[str, Any], value: float | None, least: bool) -> str:
    if value is None:
        return "not measured"

    def reaches(bound: float) -> bool:
        return value >= bound if least else value <= bound

    if not reaches(target["at_least" if least else "at_most"]):
        return "missed"
    return "aim met" if "aim" in target and reaches(target["aim"]) else "met"
