"""Tune the thresholds of a frozen network, in a run of `train.py task=tuning`."""

import itertools
import json
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from thresher.budget.tuning import Tuning as Result
from thresher.budget.tuning import tune
from thresher.budget.tuning_state import Measurement, StateFile
from thresher.checkpoints import files
from thresher.checkpoints.format import BEST, FOLDER, TUNING, TUNING_LOGGERS
from thresher.hosts.restoring import list_recipes
from thresher.hosts.saving import save_adapter
from thresher.hosts.wrapped import get_model
from thresher.run import results
from thresher.run.loggers import list_logger_ids
from thresher.run.run import Run
from thresher.tasks.tuning import Tuning

ADAPTER = "adapter"
# Settings that belong to a training, and what a tuning has in their place.
IDLE = {
    "optimizer": "task.lr and task.steps",
    "scheduler": "task.steps",
    "callbacks.calibrate": "task.batches",
    "callbacks.temperature": "attention.gate.tau",
    "callbacks.ema": "",
    "callbacks.checkpoint": "",
    "task.clip": "",
    "task.nonfinite": "",
    "trainer.limit_train_batches": "task.batches",
    "trainer.limit_val_batches": "task.held_out",
    "trainer.max_epochs": "task.steps",
    "trainer.max_steps": "task.steps",
    "trainer.accumulate_grad_batches": "data.batch_size",
    "compute.start": "",
    "compute.end": "",
    "compute.margin": "",
    "compute.weight": "",
}


def check_tuning(run: Run, trainer: pl.Trainer, task: Tuning) -> None:
    """Check that a run can tune.

    Raises:
        ValueError: It cannot; the message says what to change.
    """
    for override in run.overrides or ():
        key = override.partition("=")[0].lstrip("+~")
        if override == "callbacks=ema":
            raise ValueError("callbacks=ema has no effect with task=tuning, which trains no weights")
        for name, instead in IDLE.items():
            if f"{key}.".startswith(f"{name}."):
                hint = f": use {instead}" if instead else ""
                raise ValueError(f"{key} has no effect with task=tuning{hint}")
    if run.start.path is not None or run.config.resume not in ("auto", "never"):
        raise ValueError(f"a tuning resumes by itself, from {TUNING} of its folder: leave resume as it is")
    if run.config.init_mechanisms:
        raise ValueError("task=tuning calibrates thresholds anew: leave init_mechanisms out")
    if run.config.compile:
        raise ValueError("task=tuning switches between sparse and dense attention in each step: set compile=false")
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError("task=tuning runs on one device: set trainer.devices=1 and no strategy")
    if task.budget.bound is None or task.budget.quantity != "kept":
        raise ValueError("task=tuning needs the share of pairs to keep: set compute.target and compute.quantity=kept")


def tune_network(run: Run, trainer: pl.Trainer, task: Tuning, data: Any) -> tuple[dict[str, float], str]:
    """Tune the network of a run; write its metrics, a checkpoint and an adapter.

    Returns:
        The metrics, and the path of the checkpoint.

    Raises:
        ValueError: The run cannot tune, or see `tune`.
    """
    start, kept = time.monotonic(), task.budget.bound
    assert kept is not None
    trainer.precision_plugin.convert_module(task)  # in place
    trainer.strategy.connect(task)
    device = trainer.strategy.root_device
    task.to(device)

    def move(batches: Iterable[Any]) -> list[Any]:
        converted = map(trainer.precision_plugin.convert_input, batches)
        return [task.transfer_batch_to_device(each, device, 0) for each in converted]

    def forward(batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return task.compare(batch).output

    before = None if run.start.wandb is None else StateFile(run.folder / TUNING, {}).read()
    logged = 0 if before is None else before.step

    def log(step: int, measured: Measurement) -> None:
        for logger in trainer.loggers:
            if step <= logged and isinstance(logger, WandbLogger):  # its run continues; other logs are written again
                continue
            logger.log_metrics({"train/error": measured.error, "train/kept": measured.kept}, step=step)

    files.write_text(run.folder / TUNING_LOGGERS, json.dumps(list_logger_ids(trainer.loggers)) + "\n")
    found = tune(
        task.net,
        move(itertools.islice(data.train_dataloader(), task.batches)),
        kept,
        held_out=move(spread(data.val_dataloader(), task.held_out)),
        forward=forward,
        objective=task.objective,
        steps=task.steps,
        lr=task.lr,
        evaluate_every=task.evaluate_every,
        starts=task.starts,
        units=task.units,
        auxiliary=task.auxiliary,
        state_file=run.folder / TUNING,
        progress=run.config.callbacks.get("progress") is not None,
        on_step=log,
    )
    if found.unit is not None:
        rank_zero_info(f"thresholds are in {found.unit}, in which the best start erred least")
    path = run.folder / FOLDER / BEST
    trainer.save_checkpoint(path, weights_only=True)
    metrics = describe(found) | {"train/seconds": time.monotonic() - start}
    written = results.write_metrics(run.folder, metrics, trainer.is_global_zero)
    _save_adapter(get_model(task.net), run.folder / ADAPTER)
    return written, str(path)


def _save_adapter(model: nn.Module, folder: Path) -> None:
    if not list_recipes(model):  # a network of this project builds its mechanisms in
        return
    try:
        save_adapter(model, folder)
    except ValueError as error:
        rank_zero_warn(f"no adapter: {error}")
    else:
        rank_zero_info(f"adapter: {folder}")


def spread(loader: Collection[Any], number: int) -> Iterator[Any]:
    """Yield a number of batches from all over a loader: the first pages of a book are not the book."""
    total = len(loader)
    chosen = min(number, total)
    wanted = {i * total // chosen for i in range(chosen)}
    until = itertools.islice(loader, max(wanted, default=-1) + 1)
    return (batch for i, batch in enumerate(until) if i in wanted)


def describe(found: Result) -> dict[str, float]:
    """Describe a tuning as metrics of a run."""
    starts = {f"tune/{name}_error": measured.error for name, measured in found.starts.items()}
    headroom = dict(zip(("tune/headroom", "tune/headroom_uncertainty"), found.headroom or (), strict=False))
    return starts | headroom | {"tune/error": found.tuned.error, "tune/kept": found.tuned.kept}
