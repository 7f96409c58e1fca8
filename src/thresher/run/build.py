"""Build the parts of a run from its config: data, task, loggers, callbacks, trainer."""

import difflib
import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch import nn

from thresher.attention.mechanism import Mechanism
from thresher.attention.options import check_choice, check_integer
from thresher.callbacks.csv_log import CsvLog
from thresher.callbacks.snapshots import Snapshots
from thresher.checkpoints.save import CheckpointFiles
from thresher.run.early import check_accelerator
from thresher.run.loggers import build_logger
from thresher.run.run import Run
from thresher.run.spawned import use_launcher
from thresher.tasks.base import Task

OF_LABELS = ("num_classes", "objective")  # arguments of a model that follow from the labels of the data


def build(node: DictConfig, **arguments: Any) -> Any:
    """Build what a node of a config names."""
    return instantiate(node, **arguments, _convert_="all")


def list_nodes(group: Mapping[str, Any] | None) -> list[Any]:
    """List the nodes of callbacks or loggers; one that is null is left out, as `~` leaves it out."""
    return [node for node in (group or {}).values() if node is not None]


# Data and task


def build_data(cfg: DictConfig, classes: Sequence[str] | None = None) -> Any:
    """Build the data of a config, and read what training and validation need.

    Args:
        cfg: The config.
        classes: The classes that the data must have, where a checkpoint was trained on them.

    Raises:
        ValueError: The data have other classes.
        FileNotFoundError: The data are not where the config says.
    """
    data = build(cfg.data)
    data.set_order_seed(cfg.seed)
    data.prepare_data()
    data.setup("fit")
    if classes is not None and list(data.class_names) != list(classes):
        raise ValueError(
            f"the checkpoint has {len(classes)} classes ({', '.join(classes[:5])}, ...), "
            f"the data have {len(data.class_names)} ({', '.join(data.class_names[:5])}, ...)"
        )
    return data


def build_task(cfg: DictConfig, data: Any) -> Task:
    """Build the network and the task that trains it, for the kind of data at hand.

    Raises:
        ValueError: The model or the task is for another kind of data.
    """
    return wrap_network(cfg, data, build_network(cfg, data))


def build_network(cfg: DictConfig, data: Any) -> nn.Module:
    """Build the network of a config for the kind of data at hand.

    Raises:
        ValueError: The model is for another kind of data.
    """
    arguments = choose_model_arguments(cfg, data)
    _check_fits_data("model", cfg.model["_target_"], data, arguments)
    takes_names = "class_names" in inspect.signature(get_object(cfg.model["_target_"])).parameters
    takes_names = takes_names and bool(data.class_names) and "num_classes" in arguments
    net: nn.Module = build(cfg.model, **arguments, **({"class_names": data.class_names} if takes_names else {}))
    return net


def wrap_network(cfg: DictConfig, data: Any, net: nn.Module) -> Task:
    """Build the task of a config around a network.

    Raises:
        ValueError: The task is for another kind of data.
    """
    _check_fits_data("task", cfg.task["_target_"], data, data.task_arguments)
    task: Task = build(cfg.task)(
        net,
        optimizer=build(cfg.optimizer),
        scheduler=build(cfg.scheduler),
        budget=build(cfg.compute),
        seed=cfg.seed,
        **data.task_arguments,
    )
    return task


def choose_model_arguments(cfg: DictConfig, data: Any) -> Mapping[str, Any]:
    """Choose what a model must know of the data: without labels nothing of classes and of what is predicted."""
    if cfg.task.get("labels", True):
        arguments: Mapping[str, Any] = data.model_arguments
        return arguments
    return {name: value for name, value in data.model_arguments.items() if name not in OF_LABELS}


def _check_fits_data(group: str, target: str, data: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a model or a task that was written for another kind of data, say images in place of tokens."""
    keywords = inspect.signature(get_object(target)).parameters.values()
    named = {p.name for p in keywords if p.kind is not p.VAR_KEYWORD}
    required = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is p.empty} - {"attention"}
    if arguments.keys() - named or required - arguments.keys():
        raise ValueError(
            f"{group}: {target} is not for {type(data).__name__}. Images go with model=vit or model=timm, labelled "
            "tokens with model=encoder (both with task=classification), labelled texts with model=encoder or model=hf "
            "and task=text_classification, corpora with model=transformer and task=language_modeling"
        )


def describe_task(task: Task) -> str:
    """Describe in one line how large the network is and what attends in it."""
    mechanisms = {name: m for name, m in task.net.named_modules() if isinstance(m, Mechanism)}
    heads = sum(m.num_heads for m in mechanisms.values())
    parameters = sum(p.numel() for p in task.net.parameters())
    names = ", ".join(name.removesuffix(".mechanism") for name in mechanisms)
    return f"{type(task.net).__name__}, {parameters:,} parameters; {task.attention} in {names} ({heads} heads)"


def compile_network(task: Task) -> None:
    """Compile the network in place, so that state-dict keys stay as they are."""
    import torch._functorch.config

    # The gradients of the budget and of the task are logged separately, from the same graph.
    torch._functorch.config.donated_buffer = False
    task.net.compile()


# Loggers, callbacks, trainer


def build_loggers(run: Run) -> list[Logger]:
    """Build the loggers of a run; a resumed training continues its logs at the snapshot."""
    loggers = [build_logger(partial(build, node), run.start.wandb) for node in list_nodes(run.config.logger)]
    tables = [logger for logger in loggers if isinstance(logger, CsvLog)]
    for table, rows in zip(tables, run.start.rows or [0] * len(tables), strict=True):
        table.continue_from(rows)
    return loggers


def build_callbacks(run: Run, loggers: Sequence[Logger]) -> list[pl.Callback]:
    """Build the callbacks of a run, snapshots first: they come before others touch the next batch."""
    callbacks = []
    for node in list_nodes(run.config.callbacks):
        built_by = get_object(node["_target_"])
        takes_signals = inspect.isclass(built_by) and issubclass(built_by, Snapshots)
        callbacks.append(build(node, **({"signals": run.signals} if takes_signals else {})))
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    return sorted(callbacks, key=lambda callback: not isinstance(callback, Snapshots))


def build_training_trainer(
    run: Run, loggers: Sequence[Logger], callbacks: Sequence[pl.Callback], record: Mapping[str, Any]
) -> pl.Trainer:
    """Build the trainer of a training; its checkpoints carry the record that rebuilds their network."""
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []  # signals have one owner
    return build_trainer(
        run.config,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=str(run.folder),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        plugins=[CheckpointFiles(record), *slurm],
    )


def build_trainer(cfg: DictConfig, **arguments: Any) -> pl.Trainer:
    """Build the trainer of a config.

    Checks values that Lightning accepts silently though they are wrong, or refuses without naming them.

    Args:
        cfg: The config.
        **arguments: Arguments that no config sets.

    Raises:
        ValueError: A value is wrong; the message names it.
    """
    check_accelerator(str(cfg.trainer.accelerator))
    make: partial[pl.Trainer] = build(cfg.trainer)
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
        check_integer(f"trainer.{name}", make.keywords.get(name, 1), least)
    check_choice("trainer.deterministic", make.keywords.get("deterministic"), (True, False, "warn", None))
    try:
        trainer = make(enable_model_summary=False, **arguments)
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error
    use_launcher(trainer)
    return trainer


def check_monitors(callbacks: Sequence[pl.Callback], task: Task) -> None:
    """Refuse a callback that monitors a metric which no validation measures, before hours of training.

    Raises:
        ValueError: There is one; the message lists what is measured.
    """
    metrics: Any = task.evaluation["val"]
    known = [*(f"val/{name}" for name in metrics), "val/score"]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in known:
            close = difflib.get_close_matches(monitor, known, n=1)
            raise ValueError(
                f"{type(callback).__name__} monitors {monitor}, which is not measured"
                f"{f'; did you mean {close[0]}?' if close else '.'} Validation measures {', '.join(known)}"
            )


def quiet_lightning() -> None:
    """Suppress messages of Lightning that call for no action."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Only a sharded network is affected, and that combination is refused.
    warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    idle = ("💡", "GPU available", "TPU available", "Loading `train_dataloader")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(idle))
