"""Snapshots: checkpoints from which a training goes on as if it had never stopped.

Each is taken between two optimiser steps, before anything of the next batch has happened, so that nothing is half
done: the batch before was logged, a validation that was due is over, no gradient is held. Lightning's own counters are
stored as they are at that moment, whatever they say in the hook that writes them.
"""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from thresher.attention.options import check_number
from thresher.callbacks.csv_log import CsvLog
from thresher.interruption import Interrupted, Signals

POSITION = "position"  # key of a checkpoint: where in the data it was taken


class Snapshots(pl.Callback):
    """Write a snapshot after each epoch, and within one as often as asked for; it must be the first callback.

    Args:
        path: The file.
        every_n_steps: Optimiser steps between two of them, or None.
        every_n_minutes: Minutes between two of them, or None.

    Attributes:
        signals: Asked between two steps whether to stop, which is after a snapshot.
        seconds: How long the training has taken, interruptions left out.
        metrics: What was last measured when the snapshot was taken that the training goes on from.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(self, path: str, every_n_steps: int | None = None, every_n_minutes: float | None = 10.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None:  # which asks for none
                check_number(f"callbacks.last_checkpoint.{name}", value, above=0.0)
        self.path = path
        self.signals = Signals()
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.metrics: dict[str, float] = {}
        self._seconds_before = 0.0
        self._began = self._written = time.monotonic()
        self._step = 0
        self._writing = False

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Return how long the training has taken."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._written = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.signals.install()  # Lightning has its own way to stop, which leaves nothing behind
        self.signals.waiting = True
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
        signum = self._received(trainer)
        if trainer.global_step > self._step and (signum or self._due(trainer, batch_idx)):
            self.write(trainer)
        if signum:
            raise Interrupted(signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)
        self.signals.waiting = False
        if signum := self._received(trainer):
            raise Interrupted(signum)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.waiting = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.waiting = False

    def _received(self, trainer: pl.Trainer) -> int:
        """Return the signal that any process received, or 0."""
        if trainer.world_size == 1:
            return self.signals.received
        received = torch.tensor(self.signals.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def _due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
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
            trainer.save_checkpoint(self.path)
        finally:
            self._writing = False
        self._step, self._written = trainer.global_step, time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store where the training is, if this is a snapshot."""
        if not self._writing:
            return
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        if epochs["total"]["completed"] == epochs["total"]["started"]:
            # Training has ended: it would go on with the first batch of another epoch.
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
            "examples": first * _examples(trainer),
            "rows": [logger.rows() for logger in trainer.loggers if isinstance(logger, CsvLog)],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from a snapshot; where batches have another size now, from the batch that its examples are in."""
        if trainer.state.fn != "fit":
            return
        if POSITION not in checkpoint:
            raise ValueError(
                "this checkpoint holds weights to evaluate, but not where its training was: go on from last.ckpt, or "
                "begin a new training with its weights by init_from"
            )
        position = checkpoint[POSITION]
        self.metrics = position["metrics"]
        loader: Any = pl_module.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        size = loader.batch_sampler.batch_size * trainer.world_size
        accumulated = trainer.accumulate_grad_batches
        batch = position["examples"] // size // accumulated * accumulated
        if batch != position["batch"]:
            rank_zero_warn(
                "batches have another size than when the snapshot was taken: the training goes on, but not as it would "
                f"have without the interruption (from batch {batch} of the epoch, not {position['batch']})"
            )
            loops = checkpoint["loops"]["fit_loop"]
            current = loops["epoch_loop.batch_progress"]["current"]
            current |= dict.fromkeys(current, batch)
            loops["state_dict"]["combined_loader"] = [{"first": batch}]


def _examples(trainer: pl.Trainer) -> int:
    """Return how many examples all processes take together between two snapshots of a batch."""
    loader: Any = trainer.train_dataloader
    size: int = loader.batch_sampler.batch_size * trainer.world_size
    return size
