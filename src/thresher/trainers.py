"""Trainers as a config describes them: what Lightning would take without a word, or fail at without a name, is told."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl

from thresher.attention.options import check_choice, check_integer
from thresher.tasks.base import Task


def make_trainer(make: "partial[pl.Trainer]", **arguments: Any) -> pl.Trainer:
    """Build the trainer of a config.

    Args:
        make: The class, with what the config sets.
        **arguments: What it does not.

    Raises:
        ValueError: Something in the config cannot be; the message says what.
    """
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
        check_integer(f"trainer.{name}", make.keywords.get(name, 1), least)
    check_choice("trainer.deterministic", make.keywords.get("deterministic"), (True, False, "warn", None))
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error


def check_monitors(callbacks: Sequence[pl.Callback], task: Task) -> None:
    """Refuse a callback that watches a metric which no validation will measure, before hours of training.

    Raises:
        ValueError: There is one; the message says what is measured.
    """
    metrics: Any = task.evaluation["val"]
    known = [*(f"val/{name}" for name in metrics), "val/score"]
    for callback in callbacks:
        wanted = getattr(callback, "monitor", None)
        if isinstance(wanted, str) and wanted.startswith("val/") and wanted not in known:
            close = difflib.get_close_matches(wanted, known, n=1)
            raise ValueError(
                f"{type(callback).__name__} is to monitor {wanted}, which is not measured"
                f"{f'; did you mean {close[0]}?' if close else '.'} Validation measures {', '.join(known)}"
            )
