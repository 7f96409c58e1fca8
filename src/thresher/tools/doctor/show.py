"""The report in the terminal."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.tools.doctor.machine import find_extras

WIDE = 140
COLOURS = {"on": "green", "off": "yellow", "wrong": "red", "none": "dim"}
VERIFIED = (
    "backend=triton: on CPUs triton's interpreter compares outputs and gradients with PyTorch, and the kernels compile "
    "for sm_80, sm_90 and sm_100; the tests do both. No GPU has run them, unless this table says on."
)
CHANGES = ("padding", "future", "neighbours")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def print_machine(versions: Mapping[str, str | None], found: Mapping[str, Any]) -> None:
    """Print the machine and the installed versions."""
    table = Table(title="machine", title_justify="left", show_header=False)
    for name, value in found.items():
        table.add_row(name, escape(", ".join(value) if isinstance(value, list) else str(value)))
    installed = [f"{name} {version}" for name, version in versions.items() if version is not None]
    table.add_row("versions", escape(", ".join(installed)))
    extras: dict[str, list[str]] = {}
    for name, extra in find_extras().items():
        if versions.get(name) is None:
            extras.setdefault(extra, []).append(name)
    missing = [f"{', '.join(names)}: pip install 'thresher[{extra}]'" for extra, names in extras.items()]
    table.add_row("not installed", escape("\n".join(missing) or "nothing"))
    _console().print(table)


def print_backends(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print tables of kernels, for CPUs and for GPUs, and what has been verified of the latter."""
    console = _console()
    of_gpus = [row for row in rows if row["triton"] != "none"]
    for backend, some, state, why in (("cpu", rows, "kernel", "why"), ("triton", of_gpus, "triton", "triton_why")):
        table = Table(title=f"backend={backend} (PyTorch, backend=reference, is on for all)", title_justify="left")
        for head in ("attention=", f"backend={backend}", ""):
            table.add_column(head)
        for row in some:
            table.add_row(row["mechanism"], f"[{COLOURS[row[state]]}]{row[state]}[/]", escape(row[why]))
        console.print(table)
    console.print(VERIFIED)


def print_progress(row: Mapping[str, Any]) -> None:
    """Print on a terminal that a mechanism is done."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        console.print(f"[dim]{row['mechanism']}: {row['seconds']:.1f} s[/]")


def print_masks(model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the movements of outputs."""
    table = Table(title=f"masks of {escape(model)}", title_justify="left")
    for head in ("attention=", "where", "kept", *CHANGES, "s", ""):
        table.add_column(head)
    for row in rows:
        kept = "" if row["kept"] is None else f"{row['kept']:.2f}"
        moved = [f"{row['moved'][what]:.0e}" if what in row["moved"] else "" for what in CHANGES]
        status = "[red]FAIL[/]" if row["failed"] else "[yellow]refuses[/]" if row["refused"] else "[green]ok[/]"
        where = escape(row["refused"] or ", ".join(row["hosts"]))
        table.add_row(row["mechanism"], where, kept, *moved, f"{row['seconds']:.1f}", status)
    console = _console()
    console.print(table)
    console.print(
        "Numbers: the largest change of the outputs of real tokens, relative to the largest output, when padded "
        "tokens, later tokens or other examples change. Empty: the model hides nothing of this kind."
    )


def print_verdict(failed: Sequence[str]) -> None:
    """Print what failed."""
    console = _console()
    for line in failed:
        console.print(f"[red]failed:[/] {escape(line)}", soft_wrap=True)
    if not failed:
        console.print("[green]every check passes[/]")
