"""What a run leaves behind: metrics.json, and a table for the person who waited for it."""

import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher import files
from thresher.attention.base import Mechanism


def evaluation_folder(checkpoint: Path, kind: str) -> Path:
    """Return where an evaluation goes if nobody says: a new folder inside that of the checkpoint's run."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent  # that of an export, or of a checkpoint
    return (run.parent if run.name == "checkpoints" else run) / kind / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def new_folder(folder: str | Path) -> Path:
    """Make the folder that results go to; it must not hold a run already."""
    if (Path(folder) / "config.yaml").exists():
        raise ValueError(f"{folder} already holds a run: choose another run.dir")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def write_metrics(folder: Path | None, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Write flat metrics as JSON into a folder, if there is one, non-finite ones as null; return them as floats."""
    plain = {name: float(value) for name, value in sorted(metrics.items())}
    finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    if folder is not None:
        files.write_text(folder / "metrics.json", json.dumps(finite, indent=1) + "\n")
    return plain


def print_results(title: str, metrics: Mapping[str, float], heads: Path | None, commands: Mapping[str, str]) -> None:
    """Print test metrics, kept by layer, and commands to go on with."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    table = Table(show_header=False)
    for name, label in (
        ("test/acc", "test accuracy"),
        ("test/top5", "test top-5 accuracy"),
        ("test/f1", "test macro-F1"),
        ("test/perplexity", "test perplexity"),
        ("test/bits_per_byte", "test bits per byte"),
        ("test/loss", "test loss"),
        ("test/kept", "kept (pairs kept / visible)"),
        ("test/compute", "compute (attention MACs / dense)"),
        ("train/seconds", "training seconds"),
    ):
        if name in metrics:
            table.add_row(label, f"{metrics[name]:.1f}" if name.endswith("seconds") else f"{metrics[name]:.4f}")
    console.print(table)
    if heads is not None and heads.is_file():
        console.print(heads_table(json.loads(heads.read_text())))
    for what, command in commands.items():
        console.print(f"[bold]{what}[/]")
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def heads_table(heads: Mapping[str, Any]) -> Table:
    """Make a table of what each layer and head kept, with its threshold where it has one."""
    table = Table(title="kept (threshold) by layer and head", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("kept", justify="right")
    for i in range(max((len(layer["heads"]) for layer in heads["layers"]), default=0)):
        table.add_column(f"head {i}", justify="right", no_wrap=True)
    for layer in heads["layers"]:
        rows = layer["heads"]
        cells = [f"{r['kept']:.3f}" + ("" if r["threshold"] is None else f" ({r['threshold']:.2f})") for r in rows]
        table.add_row(layer["name"], f"{sum(r['kept'] for r in rows) / len(rows):.3f}", *cells)
    return table


def attention_name(net: Any) -> str:
    """Return the names of the mechanisms inside a network."""
    return ", ".join(sorted({type(m).__module__.rpartition(".")[2] for m in net.modules() if isinstance(m, Mechanism)}))
