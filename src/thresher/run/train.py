"""Train and test a network as a config says."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from thresher.attention.options import check_flags
from thresher.callbacks.snapshots import Snapshots
from thresher.checkpoints.format import STATE, build_record
from thresher.checkpoints.groups import describe_config
from thresher.checkpoints.load import load_checkpoint
from thresher.checkpoints.rebuild import PROJECT_CONF
from thresher.checkpoints.weights import load_initial_weights, load_weights
from thresher.run import results
from thresher.run.build import (
    build_callbacks,
    build_data,
    build_loggers,
    build_task,
    build_training_trainer,
    check_monitors,
    choose_model_arguments,
    compile_network,
    describe_task,
    quiet_lightning,
)
from thresher.run.loggers import close_loggers, list_logger_ids
from thresher.run.run import Run, open_run
from thresher.run.tune import check_tuning, tune_network
from thresher.tasks.base import Task
from thresher.tasks.tuning import Tuning


def train(
    cfg: DictConfig,
    conf: Path = PROJECT_CONF,
    folder: str | None = None,
    overrides: Sequence[str] | None = None,
) -> dict[str, float]:
    """Train and test a network as `conf/train.yaml` and its groups say; return the metrics of the run.

    Args:
        cfg: The composed config.
        conf: The folder of the configs that it was composed of.
        folder: Where the run writes; by default `run.dir` of the config.
        overrides: The overrides of the command line, for the commands that are printed at the end.

    Raises:
        ValueError: The config is wrong; the message says what to change.
        FileNotFoundError: Data are not where the config says.
    """
    quiet_lightning()
    if "dropin" in cfg:
        raise ValueError(f"{cfg.run.name} trains nothing: python eval.py experiment=... measures it")
    check_flags(init_mechanisms=cfg.init_mechanisms)
    if cfg.init_mechanisms and cfg.init_from is None:
        raise ValueError("init_mechanisms=true takes thresholds from init_from: name a checkpoint there, too")
    run = open_run(cfg, conf, folder, overrides)
    rank_zero_info(f"run folder: {run.folder}")
    pl.seed_everything(run.seed, workers=True, verbose=False)
    data = build_data(run.config)
    if cfg.test:  # report what is wrong with the test data before the training
        data.setup("test")
    results.print_data(data)
    task = build_task(run.config, data)
    _load_initial(run, task, data)
    rank_zero_info(describe_task(task))
    if cfg.compile:
        compile_network(task)
    with run.signals, close_loggers():
        loggers = build_loggers(run)
        callbacks = build_callbacks(run, loggers)
        check_monitors(callbacks, task)
        arguments = choose_model_arguments(run.config, data)
        record = build_record(_describe(run), data.class_names, arguments, list_logger_ids(loggers))
        trainer = build_training_trainer(run, loggers, callbacks, record)
        if isinstance(task, Tuning) and run.config.train:
            check_tuning(run, trainer, task)
        for logger in loggers:
            logger.log_hyperparams(run.plain_config)
        if trainer.is_global_zero:
            results.write_config(run.folder, run.plain_config)
            results.write_data(run.folder, data.summary())
        metrics, best = _fit(run, trainer, task, data) if cfg.train else ({}, "")
        if cfg.test or not cfg.train:
            metrics = _test(run, trainer, task, data, best, metrics)
    if trainer.is_global_zero:
        commands = results.suggest_commands(run, best)
        results.print_results(run.title, metrics, run.folder / results.HEADS, commands)
    return metrics


def _load_initial(run: Run, task: Task, data: Any) -> None:
    """Load the weights that a new training starts from, if the config names any, with or without mechanisms."""
    path = run.config.init_from
    if path is None or run.start.path is not None:
        return
    mechanisms = run.config.init_mechanisms
    left_out = load_initial_weights(task, path, data.model_arguments.get("num_classes"), mechanisms)
    rank_zero_info(f"weights {'and mechanisms ' * mechanisms}of {path}")
    if left_out:
        rank_zero_warn(f"{path} is for another number of classes: {', '.join(left_out)} begin untrained")


def _describe(run: Run) -> dict[str, Any]:
    """Describe the config by the names of its groups, as checkpoints store it."""
    described, unnamed = describe_config(run.plain_config, run.conf)
    if unnamed:
        rank_zero_warn(
            f"checkpoints of this run cannot be evaluated: no file of {run.conf}/{unnamed[0]} names what {unnamed[0]} "
            f"builds. Write one, and choose it by {unnamed[0]}=NAME"
        )
    return described


def _fit(run: Run, trainer: pl.Trainer, task: Task, data: Any) -> tuple[dict[str, float], str]:
    """Train or tune; write the metrics, so that a test that fails does not lose them.

    Returns:
        The metrics, and the path of the best checkpoint, empty if there is none.
    """
    if isinstance(task, Tuning):
        return tune_network(run, trainer, task, data)
    start = time.monotonic()
    path = run.start.path
    trainer.fit(task, datamodule=data, ckpt_path=path, weights_only=True)
    metrics: dict[str, Any] = dict(trainer.callback_metrics) | {"train/seconds": time.monotonic() - start}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Snapshots):
            metrics = callback.metrics | metrics | {"train/seconds": callback.seconds}
    _warn_if_over_budget(trainer, task)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return results.write_metrics(run.folder, metrics, trainer.is_global_zero), best


def _test(
    run: Run, trainer: pl.Trainer, task: Task, data: Any, best: str, metrics: dict[str, float]
) -> dict[str, float]:
    """Test the best checkpoint, or without training the one that the config names; write and return all metrics."""
    path = best if run.config.train else run.config.ckpt_path
    if path is None:
        raise ValueError("train=false tests a checkpoint: say which by ckpt_path, or use eval.py")
    if path:
        load_weights(task, load_checkpoint(path)[STATE], other_attention=False)
    if run.config.test:
        trainer.test(task, datamodule=data, verbose=False)
    measured: dict[str, Any] = metrics | (dict(trainer.callback_metrics) if run.config.test else {})
    return results.write_metrics(run.folder, measured, trainer.is_global_zero)


def _warn_if_over_budget(trainer: pl.Trainer, task: Task) -> None:
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    if task.budget.bound is not None and score is not None and score < 0:
        rank_zero_warn(
            f"no epoch held the budget of {task.budget.bound:g}: best.ckpt is the one that came nearest, "
            f"{-float(score):.3f} above it. Train longer, let the target come down earlier (compute.end), or raise it"
        )
