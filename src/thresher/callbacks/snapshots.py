"""Snapshots: checkpoints from which a training resumes as if it had never stopped.

A snapshot is taken between two optimiser steps, before the next batch begins: the last batch is logged, a due
validation is over, and there are no gradients. It stores the values that Lightning's counters have at that point, not
those in the hook that writes it.
"""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from thresher.attention.options import check_number
from thresher.callbacks.csv_log import CsvLog
from thresher.checkpoints.format import POSITION
from thresher.signals import Interrupted, Signals


class Snapshots(pl.Callback):
    """Writes a snapshot after each epoch, and at intervals within it; must be the first callback.

    Args:
        path: The file.
        every_n_steps: Optimiser steps between snapshots, or None.
        every_n_minutes: Minutes between snapshots, or None.
        signals: Signals of the run: at a signal the training writes a snapshot and stops.

    Attributes:
        metrics: The last metrics of the snapshot that the training resumes.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self,
        path: str,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 10.0,
        signals: Signals | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None:  # None takes none at this interval
                check_number(f"callbacks.last_checkpoint.{name}", value, above=0.0)
        self.path = path
        self.signals = Signals() if signals is None else signals
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.metrics: dict[str, float] = {}
        self._seconds_before = 0.0
        self._started: float | None = None  # while training
        self._written = time.monotonic()
        self._step = 0
        self._writing = False

    @property
    def seconds(self) -> float:
        """Time of the training without interruptions, in seconds."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def restore_metrics(self, metrics: dict[str, float]) -> None:
        """Restore the last metrics of the process that trained."""
        self.metrics = metrics

    def state_dict(self) -> dict[str, Any]:
        """Store the time of the training."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the clock."""
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._written = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.signals.install()  # Lightning would stop without a snapshot
        self.signals.defer()
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return
        # Lightning restores a loader only where it makes it later than the schedule of learning rates.
        loader: Any = trainer.train_dataloader
        loader.load_state_dict({"first": loop.batch_progress.current.completed})
        fetcher: Any = trainer.fit_loop._data_fetcher
        if loop._should_check_val_fx(fetcher) and not loop._should_accumulate():
            # Lightning passes over the validation that the snapshot comes after, but counts that as a step.
            loop._batches_that_stepped -= 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        signum = self._find_signal(trainer)
        if trainer.global_step > self._step and (signum or self._is_due(trainer, batch_idx)):
            self.write(trainer)
        if signum:
            raise Interrupted(signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)
        self.signals.raise_at_once()
        if signum := self._find_signal(trainer):
            raise Interrupted(signum)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.raise_at_once()
        self._seconds_before, self._started = self.seconds, None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.raise_at_once()

    def _find_signal(self, trainer: pl.Trainer) -> int:
        """Find the signal that any process received, or 0."""
        if trainer.world_size == 1:
            return self.signals.received
        received = torch.tensor(self.signals.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def _is_due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        steps = self.every_n_steps is not None and trainer.global_step - self._step >= self.every_n_steps
        if batch_idx == 0 or steps:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._written >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def write(self, trainer: pl.Trainer) -> None:
        """Write a snapshot; all processes call this, between two steps."""
        self._writing = True
        try:
            trainer.save_checkpoint(self.path, weights_only=False)  # None would warn every time
        finally:
            self._writing = False
        self._step, self._written = trainer.global_step, time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the position of the training, if this is a snapshot."""
        if not self._writing:
            return
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        if epochs["total"]["completed"] == epochs["total"]["started"]:
            # Training has ended: it would continue with the first batch of another epoch.
            batches["current"] = dict.fromkeys(batches["current"], 0)
            for count in (epochs["total"], epochs["current"]):
                count["ready"] += 1
                count["started"] += 1
        else:
            for count in (batches["total"], batches["current"]):
                count["ready"] = count["completed"]
        batches["is_last_batch"] = False
        first = batches["current"]["completed"]
        loops["state_dict"]["combined_loader"] = [{"first": first}]
        checkpoint[POSITION] = {
            "batch": first,
            "examples": first * _count_examples(trainer),
            "rows": [logger.count_rows() for logger in trainer.loggers if isinstance(logger, CsvLog)],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume a snapshot; if the batch size has changed, at the batch of its next example."""
        if trainer.state.fn != "fit":
            return
        if POSITION not in checkpoint:
            raise ValueError(
                "this checkpoint holds weights to evaluate, but not the position of its training: resume from "
                "last.ckpt, or begin a new training with its weights by init_from"
            )
        position = checkpoint[POSITION]
        self.metrics = position["metrics"]
        loader: Any = pl_module.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        size = loader.batch_sampler.batch_size * trainer.world_size
        accumulated = trainer.accumulate_grad_batches
        batch = position["examples"] // size // accumulated * accumulated
        if batch != position["batch"]:
            rank_zero_warn(
                "the batch size has changed since the snapshot: the training continues, but not as it would have "
                f"without the interruption (from batch {batch} of the epoch, not {position['batch']})"
            )
            loops = checkpoint["loops"]["fit_loop"]
            current = loops["epoch_loop.batch_progress"]["current"]
            current |= dict.fromkeys(current, batch)
            loops["state_dict"]["combined_loader"] = [{"first": batch}]


def _count_examples(trainer: pl.Trainer) -> int:
    """Count the examples that all processes together take in a batch."""
    loader: Any = trainer.train_dataloader
    size: int = loader.batch_sampler.batch_size * trainer.world_size
    return size
