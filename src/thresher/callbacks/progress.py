"""Progress: a Rich bar on a terminal, plain lines elsewhere; both show compute, distance to its aim, time left."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

from thresher.console import format_time

SHOWN = {"train/loss": "loss", "train/acc": "acc", "train/kept": "kept", "train/gap": "above aim", "val/acc": "val_acc"}


def build_progress() -> ProgressBar:
    """Build the progress display that suits standard output."""
    return TerminalProgress() if sys.stdout.isatty() else PlainProgress()


class TimeLeft:
    """Estimates the time left from the share of training done since the clock was started."""

    def __init__(self) -> None:
        self._start = (0.0, 0.0)

    def start(self, share: float) -> None:
        """Start the clock at a share of the training."""
        self._start = (time.monotonic(), share)

    def format(self, share: float) -> str:
        """Format the time left at a share of the training."""
        start, first = self._start
        if share <= first:
            return format_time(None)
        return format_time((time.monotonic() - start) * (1 - share) / (share - first))


def format_metrics(trainer: pl.Trainer) -> dict[str, str]:
    """Format the metrics that fit into a line, under short names."""
    metrics = trainer.callback_metrics
    return {short: f"{float(metrics[name]):.3f}" for name, short in SHOWN.items() if name in metrics}


def compute_progress(trainer: pl.Trainer) -> float:
    """Compute the finished share of the training steps."""
    return min(trainer.global_step / max(float(trainer.estimated_stepping_batches), 1.0), 1.0)


class TerminalProgress(RichProgressBar):
    """Rich's bar, with the remaining time of the whole training; it seldom reads values from the device.

    Args:
        every: Seconds between two readings.
    """

    def __init__(self, every: float = 0.5) -> None:
        super().__init__(leave=False, refresh_rate=5)
        self.every = every
        self._left = TimeLeft()
        self._next = 0.0
        self._shown: dict[str, str] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._left.start(compute_progress(trainer))
        if trainer.fit_loop.restarted_mid_epoch:  # Lightning does not call this hook again
            self.on_train_epoch_start(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.every
            self._shown = format_metrics(trainer)
        return self._shown | ({"left": self._left.format(compute_progress(trainer))} if trainer.training else {})


class PlainProgress(ProgressBar):
    """One line every few seconds, for logs and pipes.

    Args:
        every: Seconds between two lines.
    """

    def __init__(self, every: float = 10.0) -> None:
        super().__init__()
        self.every = every
        self._left = TimeLeft()
        self._next = 0.0
        self._on = True

    def disable(self) -> None:
        self._on = False

    def enable(self) -> None:
        self._on = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left.start(compute_progress(trainer))
        self._next = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.every
            self._print_line(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print_line(trainer)

    def _print_line(self, trainer: pl.Trainer) -> None:
        if self._on and trainer.is_global_zero:
            done = compute_progress(trainer)
            values = [f"{name} {value}" for name, value in format_metrics(trainer).items()]
            parts = [f"{done:4.0%}", f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *values]
            print("  ".join([*parts, f"left {self._left.format(done)}"]), flush=True)
