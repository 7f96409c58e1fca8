"""Collect threshold and kept share of each layer and head, for loggers, as a picture and as heads.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from thresher.attention.contract import Cost
from thresher.attention.shared.thresholds import named_thresholds
from thresher.checkpoints import files
from thresher.tasks.base import Task


class HeadStatistics(pl.Callback):
    """Collect kept / visible pairs of every head during validation and test.

    Args:
        path: Where to write the last statistics as JSON, or None:
            `{"layers": [{"name", "heads": [{"threshold", "kept", "compute"}]}]}`, threshold null without a finite one.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._sums: dict[str, Tensor] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums = {}

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums = {}

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._add(pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._add(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, self.compute_heads(pl_module))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heads = self.compute_heads(pl_module)
        if self.path is not None and trainer.is_global_zero:
            layers = [{"name": name, "heads": rows} for name, rows in heads.items()]
            files.write_text(Path(self.path), json.dumps({"layers": layers}, indent=1))

    def _add(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        for name, cost in pl_module.meter.calls:
            sums = _sum_by_head(cost)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute_heads(self, task: pl.LightningModule) -> dict[str, list[dict[str, float | None]]]:
        """Compute threshold, kept share and compute of each head by layer, over all processes."""
        assert isinstance(task, Task)
        thresholds = {name: each.values().tolist() for name, each in named_thresholds(task.net)}
        heads = {}
        for name, sums in self._sums.items():
            total: Any = task.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
            kept, visible, spent, dense = total.tolist()
            own = thresholds.get(name, [None] * len(kept))
            heads[name.removesuffix(".mechanism")] = [
                {
                    "threshold": t if t is None or math.isfinite(t) else None,
                    "kept": k / max(v, 1.0),
                    "compute": s / max(d, 1.0),
                }
                for t, k, v, s, d in zip(own, kept, visible, spent, dense, strict=True)
            ]
        return heads

    def _log(self, trainer: pl.Trainer, heads: Mapping[str, list[dict[str, float | None]]]) -> None:
        scalars = {
            f"heads/{layer}.{i}/{key}": row[key]
            for layer, rows in heads.items()
            for i, row in enumerate(rows)
            for key in ("threshold", "kept")
            if row[key] is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)  # type: ignore[arg-type]
            if isinstance(logger, (WandbLogger, TensorBoardLogger)) and trainer.is_global_zero:
                log_heat_maps(logger, heads, trainer.global_step)


def _sum_by_head(cost: Cost) -> Tensor:
    parts = (cost.kept, cost.visible, cost.total, cost.dense)
    return torch.stack([part.detach().sum(0).float() for part in parts])


def log_heat_maps(logger: Logger, heads: Mapping[str, list[dict[str, float | None]]], step: int) -> None:
    """Send heat maps of kept share and of thresholds, layers down and heads across."""
    from matplotlib.figure import Figure

    for key in ("kept", "threshold"):
        rows = [[row[key] for row in layer] for layer in heads.values()]
        if any(value is None for row in rows for value in row):
            continue
        width = max(len(row) for row in rows)
        table = [[float("nan") if v is None else v for v in row] + [float("nan")] * (width - len(row)) for row in rows]
        figure = Figure(figsize=(1.5 + 0.6 * width, 1.2 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set_yticks(range(len(rows)), list(heads))
        axes.set_xticks(range(width))
        axes.set_xlabel("head")
        axes.set_title("share of visible pairs kept" if key == "kept" else "threshold")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white", fontsize=7)
        figure.colorbar(image)
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({f"heads/{key}": wandb.Image(figure), "trainer/global_step": step})
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(f"heads/{key}", figure, step)
