"""Write the files of a run, and print its tables and further commands."""

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.checkpoints import files
from thresher.checkpoints.format import FOLDER
from thresher.config.overrides import quote
from thresher.data.summary import PartSummary, build_json
from thresher.run.run import Run

CONFIG, METRICS, DATA, HEADS = "config.yaml", "metrics.json", "data.json", "heads.json"
SHOWN = {
    "test/acc": "test accuracy",
    "test/top5": "test top-5 accuracy",
    "test/f1": "test macro-F1",
    "test/perplexity": "test perplexity",
    "test/bits_per_byte": "test bits per byte",
    "test/loss": "test loss",
    "test/dense_acc": "accuracy with dense attention",
    "test/dense_perplexity": "perplexity with dense attention",
    "test/cosine": "cosine with the dense output",
    "test/error": "error against the dense output",
    "tune/share_error": "held-out error, each head its share",
    "tune/value_error": "held-out error, one threshold for all",
    "tune/greedy_error": "held-out error, shares by sensitivity",
    "tune/error": "held-out error, tuned",
    "tune/headroom": "headroom of allocation, predicted",
    "tune/headroom_uncertainty": "  give or take",
    "test/kept": "kept (pairs kept / visible)",
    "test/compute": "compute (attention MACs / dense)",
    "train/seconds": "training seconds",
}
SPARSE_OPTIONS = ("attention", "compute")  # groups that the dense baseline replaces
SPARSE_LOSSES = ("task.distill", "task.auxiliary.")  # which it refuses
MANY_HEADS = 8  # more do not fit beside each other on a terminal
RUN_OPTIONS = ("run", "ckpt_path", "train", "optimized_metric", "logger")  # keys that do not change the schedule


# Files


def choose_folder(checkpoint: Path, kind: str) -> Path:
    """Choose a new folder for an evaluation, inside that of the checkpoint's run."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent  # that of an export, or of a checkpoint
    return (run.parent if run.name == FOLDER else run) / kind / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def create_folder(folder: Path) -> None:
    """Create the folder that results go to.

    Raises:
        ValueError: It holds a run already.
    """
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a run: choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the config of a run; a continuation with other settings writes another beside it."""
    path, text = folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    existing = sorted(folder.glob("config*.yaml"))
    if any(each.read_text() == text for each in existing):
        return
    files.write_text(path.with_stem(f"config_{len(existing)}") if existing else path, text)


def write_metrics(folder: Path, metrics: Mapping[str, Any], is_first: bool) -> dict[str, float]:
    """Write metrics as JSON, non-finite ones as null, and return them as floats; only the first process writes."""
    plain = {name: float(value) for name, value in sorted(metrics.items())}
    finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    if is_first:
        files.write_text(folder / METRICS, json.dumps(finite, indent=1) + "\n")
    return plain


def write_data(folder: Path, parts: Sequence[PartSummary]) -> None:
    """Write a summary of the data into a folder."""
    files.write_text(folder / DATA, json.dumps(build_json(parts), indent=1) + "\n")


# Terminal


def print_data(data: Any) -> None:
    """Print a line for each part of the data."""
    for part in data.summary():
        rank_zero_info(part.line())


def print_results(title: str, metrics: Mapping[str, float], heads: Path | None, commands: Mapping[str, str]) -> None:
    """Print test metrics, the kept share by layer, and commands to continue with."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    table = Table(show_header=False)
    for name, label in SHOWN.items():
        if name in metrics:
            table.add_row(label, _format_metric(name, metrics[name]))
    console.print(table)
    if heads is not None and heads.is_file():
        console.print(build_heads_table(json.loads(heads.read_text())))
    for purpose, command in commands.items():
        console.print(f"[bold]{purpose}[/]")
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def _format_metric(name: str, value: float) -> str:
    if name.endswith("error"):
        return f"{value:.4g}"
    return f"{value:.1f}" if name.endswith("seconds") else f"{value:.4f}"


def build_heads_table(heads: Mapping[str, Any]) -> Table:
    """Build a table of the kept share of each layer and head, with thresholds where there are any."""
    if max((len(layer["heads"]) for layer in heads["layers"]), default=0) > MANY_HEADS:
        return _build_ranges_table(heads)
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


def _build_ranges_table(heads: Mapping[str, Any]) -> Table:
    """Build a table of the heads of each layer that keep least and most, where there are too many to list."""
    table = Table(title="kept by layer; heads that keep least and most", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in ("kept", "least", "most", "thresholds"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in heads["layers"]:
        kept = [row["kept"] for row in layer["heads"]]
        values = [row["threshold"] for row in layer["heads"] if row["threshold"] is not None]
        ends = [f"{kept[i]:.3f} (head {i})" for i in (kept.index(min(kept)), kept.index(max(kept)))]
        span = f"{min(values):.2f} to {max(values):.2f}" if values else ""
        table.add_row(layer["name"], f"{sum(kept) / len(kept):.3f}", *ends, span)
    return table


def suggest_commands(run: Run, best: str) -> dict[str, str]:
    """Suggest commands after a training: its evaluation, and the dense baseline of the same schedule."""
    commands = {"evaluate this checkpoint": f"python eval.py ckpt={_quote_path(best)}"} if best else {}
    baseline = run.config.attention["_target_"].endswith(".Dense") or run.config.task["_target_"].endswith(".Tuning")
    if run.overrides is None or baseline:
        return commands
    by_key = {o.partition("=")[0].lstrip("+~"): o for o in run.overrides}
    if "experiment" not in by_key:
        places = tuple(f"{key.partition('@')[2]}." for key in by_key if "@" in key)
        kept = [
            shlex.quote(override)
            for key, override in by_key.items()
            if key.replace("@", ".").partition(".")[0] not in (*SPARSE_OPTIONS, *RUN_OPTIONS)
            and not key.startswith((*places, *SPARSE_LOSSES))
        ]
        commands["train the dense baseline of the same schedule"] = " ".join(
            ["python train.py attention=dense compute=free", *kept]
        )
    return commands


def _quote_path(path: str | Path) -> str:
    return shlex.quote(quote(os.path.relpath(path)))
