"""The rows in the terminal: a line as each finishes, and tables at the end."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from thresher.tools.bench.summary import SPEEDUPS, USUAL_DTYPE, Record, describe_crossovers

COLUMNS = {
    "mechanism": "mechanism",
    "setting": "setting",
    "backend": "backend",
    "device": "device",
    "dtype": "type",
    "n": "N",
    "fwd_ms": "fwd ms",
    "bwd_ms": "bwd ms",
    "dense_fwd_ms": "dense fwd",
    "dense_bwd_ms": "dense bwd",
    "speedup_fwd": "x fwd",
    "speedup_fwd_bwd": "x fwd+bwd",
    "speedup_step": "x step",
    "peak_mb": "peak MiB",
    "dense_peak_mb": "dense MiB",
    "kept": "kept",
    "mac_ratio": "MACs",
    "rel_error": "error",
}
WORDS = ("mechanism", "setting", "backend", "device", "dtype")
USUAL = {"device": "cpu", "dtype": USUAL_DTYPE}  # a column of nothing else is not shown
WIDE = 168


def format_row(record: Record, share: float, left: str) -> str:
    """Format the line of a row that finishes."""
    names = [record[key] for key in ("mechanism", "setting", "backend", "pattern", "dtype") if record[key]]
    name = " ".join(str(each) for each in names if each != USUAL_DTYPE)
    head = f"{share:4.0%}  {name} N {record['n']}"
    if record["status"] != "ok":
        return f"{head}  {record['status']}: {record['note']}  left {left}"
    parts = [
        f"forward {format_cell('fwd_ms', record['fwd_ms'])} ms, dense {format_cell('fwd_ms', record['dense_fwd_ms'])}"
    ]
    parts += [f"{word} {record[key]:.2f} x" for key, word in SPEEDUPS.items() if record[key] is not None]
    parts += [f"kept {record['kept']:.3f}"] if record["kept"] is not None else []
    return f"{head}  {'  '.join(parts)}  left {left}"


def print_summary(records: Sequence[Record], verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each pattern, where each contender is faster, and the targets."""
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for pattern in dict.fromkeys((r["pattern"], r["model"]) for r in records):
        console.print(_build_table([r for r in records if (r["pattern"], r["model"]) == pattern], *pattern))
    console.print(
        "Times are medians; dense attention takes turns with each row. x is dense / this: below 1 is slower. MACs and "
        "kept are counts relative to dense attention; only x is speed.",
        highlight=False,
    )
    for text in describe_crossovers(records):
        console.print(text, highlight=False, soft_wrap=True)
    notes: dict[str, list[str]] = {}
    for record in records:
        if record["note"]:
            text = (
                f"{record['mechanism']} {record['setting']} {record['pattern']}, {record['status']}: {record['note']}"
            )
            notes.setdefault(text, []).append(str(record["n"]))
    for text, lengths in notes.items():
        console.print(f"{text} (N {', '.join(lengths)})", markup=False, highlight=False, soft_wrap=True)
    if verdicts:
        console.print(_build_targets_table(verdicts))


def _build_table(rows: Sequence[Record], pattern: str, model: str | None) -> Table:
    kind = {None: "", "decode": ", one query with cached keys"}.get(model, f", {model}: whole training steps")
    table = Table(title=f"{pattern}{kind}", title_justify="left")
    shown = [
        c for c in COLUMNS if c in ("fwd_ms", "setting") or any(r[c] not in (None, "", USUAL.get(c)) for r in rows)
    ]
    for column in shown:
        table.add_column(COLUMNS[column], justify="left" if column in WORDS else "right", no_wrap=column in WORDS)
    for i, row in enumerate(rows):
        failed = row["status"] != "ok"
        values = [
            f"[red]{row['status']}[/]" if failed and column == "fwd_ms" else format_cell(column, row[column])
            for column in shown
        ]
        last = i + 1 == len(rows) or rows[i + 1]["mechanism"] != row["mechanism"]
        table.add_row(*values, end_section=last)
    return table


def format_cell(column: str, value: Any) -> str:
    """Format a value for a table."""
    if value is None:
        return ""
    if column in ("kept", "mac_ratio"):
        return f"{value:.3f}"
    if column == "rel_error":
        return f"{value:.1e}"
    if column.startswith("speedup"):
        return f"{value:.2f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if column.endswith("_ms") and value < 1 else f"{value:.1f}"


def _build_targets_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="targets", title_justify="left")
    for head in ("where", "measure", "required", "aim", "measured", ""):
        table.add_column(head)
    for v in verdicts:
        where = ", ".join(f"{value}" if key in WORDS else f"{key} {value}" for key, value in v.get("where", {}).items())
        bound = f">= {v['at_least']}" if "at_least" in v else f"<= {v['at_most']}"
        value = "" if v["measured"] is None else f"{v['measured']:.3g}"
        colour = {"missed": "red", "not measured": "yellow"}.get(v["verdict"], "green")
        text = f"[{colour}]{v['verdict']}[/]"
        table.add_row(where, v["measure"], bound, str(v.get("aim", "")), value, text)
    return table
