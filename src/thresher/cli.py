"""The two commands: train a network as a config says, and evaluate a checkpoint as its own config says."""

import inspect
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from thresher import __version__, overrides
from thresher.attention.base import Mechanism
from thresher.callbacks.csv_log import CsvLog
from thresher.callbacks.heads import HeadStatistics
from thresher.callbacks.progress import progress
from thresher.callbacks.snapshots import Snapshots
from thresher.checkpoint import RECORD, begin_from, load, load_weights
from thresher.explain.example import explain, wanted_examples
from thresher.interruption import Interrupted, Signals
from thresher.loggers import connected
from thresher.results import attention_name, evaluation_folder, new_folder, print_results, write_metrics
from thresher.resuming import NEWEST, PREVIOUS, Beginning, beginning, run_folder, save_config
from thresher.saving import CheckpointFiles
from thresher.secrets import redacted
from thresher.tasks.base import Task
from thresher.trainers import check_monitors, make_trainer
from thresher.trust import run_config

EVAL_KEYS = ("ckpt", "run.dir", "explain", "explain.example")
REPLACEABLE = ("attention", "data", "trainer")  # groups that another choice can stand in for
USED = (*REPLACEABLE, "model", "task")  # groups that an evaluation reads
INITIAL = ("theta", "tau", "trainable")  # of a mechanism: what training begins with


# Training


def train(cfg: DictConfig) -> dict[str, float]:
    """Train and test a network as `conf/train.yaml` and its groups say; return the metrics of the run.

    Raises:
        ValueError: Something in the config cannot be; the message says what to change.
        FileNotFoundError: Data are not where the config says.
    """
    quiet_lightning()
    if "dropin" in cfg:
        raise ValueError(f"{cfg.run.name} trains nothing: python eval.py experiment=... measures it")
    folder = run_folder(cfg)
    config = plain_config(cfg)
    start = beginning(cfg, config, folder)
    if "wandb" in (cfg.logger or {}) and cfg.logger.wandb.id is None:
        cfg.logger.wandb.id = start.wandb
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = read_data(cfg)
    task = build_task(cfg, data)
    if cfg.init_from is not None and start.path is None:
        anew = begin_from(task, cfg.init_from, data.model_arguments.get("num_classes"))
        rank_zero_info(f"weights of {cfg.init_from}")
        if anew:
            rank_zero_warn(f"{cfg.init_from} is for another number of classes: {', '.join(anew)} begin anew")
    rank_zero_info(describe(task))
    if cfg.compile:
        compile_network(task)
    with Signals() as signals, _closed_loggers():
        trainer = _trainer(cfg, folder, start, signals)
        task.stored = {
            "version": __version__,
            "config": config,
            "classes": list(data.class_names),
            "model_arguments": dict(data.model_arguments),
            "loggers": _identities(trainer.loggers),
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
        if trainer.is_global_zero:
            save_config(config, folder)
        check_monitors(trainer.callbacks, task)  # type: ignore[attr-defined]
        metrics, best = _fit_and_test(cfg, trainer, task, data, folder, start)
    if trainer.is_global_zero:
        print_results(f"{cfg.run.name}  →  {folder}", metrics, folder / "heads.json", _commands(cfg, best))
    return metrics


def _trainer(cfg: DictConfig, folder: Path, start: Beginning, signals: Signals) -> pl.Trainer:
    callbacks = [make(callback) for callback in (cfg.callbacks or {}).values()]
    if not cfg.logger:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    loggers = [connected(partial(make, logger)) for logger in (cfg.logger or {}).values()]
    tables = [logger for logger in loggers if isinstance(logger, CsvLog)]
    for table, rows in zip(tables, start.rows or [0] * len(tables), strict=True):
        table.go_on(rows)
    callbacks.sort(key=lambda callback: not isinstance(callback, Snapshots))  # before others touch the next batch
    for callback in callbacks:
        if isinstance(callback, Snapshots):
            callback.signals = signals
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []  # signals have one owner
    return make_trainer(
        make(cfg.trainer),
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=str(folder),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        enable_model_summary=False,
        plugins=[CheckpointFiles({NEWEST: PREVIOUS}), *slurm],
    )


def _fit_and_test(
    cfg: DictConfig, trainer: pl.Trainer, task: Task, data: Any, folder: Path, begun: Beginning
) -> tuple[dict[str, float], str]:
    """Train and test as far as `cfg` wants; return the metrics and the path of the best checkpoint, if there is one.

    Metrics are written after each of the two: a test that fails does not take the training's with it.
    """
    metrics: dict[str, Any] = {}
    best = ""
    if not cfg.train:
        if cfg.ckpt_path is None:
            raise ValueError("train=false tests a checkpoint: say which by ckpt_path, or use eval.py")
        load_weights(task, load(cfg.ckpt_path)["state_dict"], other_attention=False)
    else:
        start = time.monotonic()
        trainer.fit(task, datamodule=data, ckpt_path=begun.path, weights_only=True)
        metrics = dict(trainer.callback_metrics) | {"train/seconds": time.monotonic() - start}
        for snapshots in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(snapshots, Snapshots):
                metrics = snapshots.metrics | metrics | {"train/seconds": snapshots.seconds}
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        _warn_if_over_budget(trainer, task)
        _write(trainer, folder, metrics)
    if cfg.test:
        if best:
            load_weights(task, load(best)["state_dict"], other_attention=False)
        trainer.test(task, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    return _write(trainer, folder, metrics), best


def _write(trainer: pl.Trainer, folder: Path, metrics: dict[str, Any]) -> dict[str, float]:
    return write_metrics(folder if trainer.is_global_zero else None, metrics)


def _warn_if_over_budget(trainer: pl.Trainer, task: Task) -> None:
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    if task.budget.bound is not None and score is not None and score < 0:
        rank_zero_warn(
            f"no epoch held the budget of {task.budget.bound:g}: best.ckpt is the one that came nearest, "
            f"{-float(score):.3f} above it. Train longer, let the target come down earlier (compute.end), or raise it"
        )


def build_task(cfg: DictConfig, data: Any) -> Task:
    """Build the network and what trains it, for the kind of data at hand."""
    _check_fits_data("model", cfg.model["_target_"], data, data.model_arguments)
    _check_fits_data("task", cfg.task["_target_"], data, data.task_arguments)
    net = make(cfg.model, **data.model_arguments)
    task: Task = make(cfg.task)(
        net,
        optimizer=make(cfg.optimizer),
        scheduler=make(cfg.scheduler),
        budget=make(cfg.compute),
        **data.task_arguments,
    )
    task.attention = attention_name(net)
    task.seed = cfg.seed
    return task


def _check_fits_data(group: str, target: str, data: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a model or a task that was written for another kind of data, say images in place of tokens."""
    keywords = inspect.signature(get_object(target)).parameters.values()
    named = {p.name for p in keywords if p.kind is not p.VAR_KEYWORD}
    lacks = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is p.empty} - {"attention"}
    if arguments.keys() - named or lacks - arguments.keys():
        raise ValueError(
            f"{group}: {target} is not for {type(data).__name__}. Images go with model=vit or model=timm, labelled "
            "tokens with model=encoder (both with task=classification), labelled texts with model=encoder or model=hf "
            "and task=text_classification, corpora with model=transformer and task=language_modeling"
        )


def describe(task: Task) -> str:
    """Say in one line how large the network is and what attends in it."""
    mounted = [(name, m) for name, m in task.net.named_modules() if isinstance(m, Mechanism)]
    heads = sum(m.num_heads for _, m in mounted)
    parameters = sum(p.numel() for p in task.net.parameters())
    names = ", ".join(name.removesuffix(".mechanism") for name, _ in mounted)
    return f"{type(task.net).__name__}, {parameters:,} parameters; {task.attention} in {names} ({heads} heads)"


def quiet_lightning() -> None:
    """Leave out messages of Lightning's that nobody can act on."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Only a sharded network is affected, and that combination is refused.
    warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    idle = ("💡", "GPU available", "TPU available", "Loading `train_dataloader`")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(idle))


def compile_network(task: Task) -> None:
    """Compile the network in place, so that state-dict keys stay as they are."""
    import torch._functorch.config

    # The gradient of the budget is logged apart from the task's, from the same graph.
    torch._functorch.config.donated_buffer = False
    task.net.compile()


def _identities(loggers: Sequence[Any]) -> dict[str, str]:
    """Return what a later run must know to go on with the same wandb run."""
    return {"wandb": logger.experiment.id for logger in loggers if isinstance(logger, WandbLogger)}  # noqa: B035


def _commands(cfg: DictConfig, best: str) -> dict[str, str]:
    """Return the commands to go on with: evaluation, and the dense baseline of the same schedule."""
    commands = {"evaluate this checkpoint": f"python eval.py ckpt={_quoted(best)}"} if best else {}
    if not HydraConfig.initialized() or cfg.attention["_target_"].endswith(".Dense"):
        return commands
    named = {o.partition("=")[0].lstrip("+~"): o for o in HydraConfig.get().overrides.task}
    own = ("attention", "compute", "run", "ckpt_path", "train", "optimized_metric", "logger")
    if "experiment" not in named:
        places = tuple(f"{key.partition('@')[2]}." for key in named if "@" in key)
        kept = [
            shlex.quote(o)
            for key, o in named.items()
            if key.replace("@", ".").partition(".")[0] not in own and not key.startswith(places)
        ]
        commands["train the dense baseline of the same schedule"] = " ".join(
            ["python train.py attention=dense compute=free", *kept]
        )
    return commands


def _quoted(path: str | Path) -> str:
    return shlex.quote(overrides.quoted(os.path.relpath(path)))


# Evaluation


def evaluate(arguments: Sequence[str], conf: Path) -> dict[str, float]:
    """Test a checkpoint, rebuilt from its own config with `arguments` as overrides; return its metrics.

    Raises:
        ValueError: An override is wrong, or the checkpoint cannot be read, trusted or rebuilt.
        FileNotFoundError: There is no such checkpoint, or its data are not there.
    """
    quiet_lightning()
    given = overrides.parse(arguments)
    own = {o.key_or_group: o.value() for o in given if o.key_or_group in EVAL_KEYS}
    path, examples = overrides.checkpoint_in(given), wanted_examples(own)
    cfg, checkpoint, other = rebuilt(path, [o for o in given if o.key_or_group not in EVAL_KEYS], conf)
    folder = new_folder(str(own.get("run.dir") or evaluation_folder(path, "eval")))
    cfg.run.dir = str(folder)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = data_of(cfg, checkpoint[RECORD]["classes"])
    task = build_task(cfg, data)
    load_weights(task, checkpoint["state_dict"], other_attention=other)
    trainer = make_trainer(
        make(cfg.trainer),
        logger=False,
        callbacks=[HeadStatistics(str(folder / "heads.json")), progress()],
        enable_checkpointing=False,
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    if examples and trainer.is_global_zero:  # before the test, which takes longer to fail
        explain(task.to(trainer.strategy.root_device), data, examples, folder / "explain")
    trainer.test(task, datamodule=data, verbose=False)
    written = _write(trainer, folder, dict(trainer.callback_metrics))
    cfg.train, cfg.ckpt_path = False, str(path)
    if trainer.is_global_zero:
        OmegaConf.save(OmegaConf.create(plain_config(cfg)), folder / "config.yaml")
        show = {"show its attention maps": f"python -m thresher.report {shlex.quote(str(folder))}"} if examples else {}
        print_results(f"{path}  →  {folder}", written, folder / "heads.json", show)
    return written


def rebuilt(path: Path, given: Sequence[Any], conf: Path) -> tuple[DictConfig, dict[str, Any], bool]:
    """Return the config of a checkpoint with overrides applied, the checkpoint, and whether its attention is another.

    Raises:
        ValueError: An override is wrong, or the checkpoint cannot be read or trusted.
        FileNotFoundError: There is no such checkpoint.
    """
    checkpoint = load(path)
    cfg = run_config(checkpoint[RECORD]["config"], conf, path)
    was = cfg.attention["_target_"]
    if cfg.model.get("attention") == cfg.attention:
        cfg.model.attention = "${attention}"
    for override in sorted(given, key=lambda o: not overrides.is_group(conf, o.key_or_group)):
        _apply(cfg, override, conf)
    other: bool = cfg.attention["_target_"] != was
    nodes = [place.partition("@")[2] for place in overrides.places(conf)]
    for node in nodes if other else ():  # another mechanism is one for all places
        if OmegaConf.select(cfg, node) is not None:
            OmegaConf.update(cfg, node, None)
    initial = {f"{node}.{key}" for node in ("attention", *nodes) for key in INITIAL}
    for override in given:
        if override.key_or_group in initial and not other:
            raise ValueError(f"{override.key_or_group} is a starting value: the checkpoint's own thresholds are used")
    if "pretrained" in cfg.model:
        cfg.model.pretrained = False
    return cfg, checkpoint, other


def data_of(cfg: DictConfig, classes: Sequence[str]) -> Any:
    """Read the data of a config; they must tell the same classes apart as the network that was trained."""
    data = read_data(cfg)
    if list(data.class_names) != classes:
        raise ValueError(
            f"the checkpoint tells {len(classes)} classes apart ({', '.join(classes[:5])}, ...), "
            f"the data have {len(data.class_names)} ({', '.join(data.class_names[:5])}, ...)"
        )
    return data


def _apply(cfg: DictConfig, override: Any, conf: Path) -> None:
    """Apply one override to a stored config: a choice of a group, or a value."""
    key = override.key_or_group
    if override.is_sweep_override():
        raise ValueError(f"eval.py takes one value for {key}; call it once for each")
    if override.is_delete():
        raise ValueError(f"eval.py cannot delete {key}: a checkpoint is rebuilt as a whole")
    if overrides.is_group(conf, key):
        if override.package:
            raise ValueError(
                f"eval.py replaces {key} as a whole, by {key}=...; {override.get_key_element()} is trained"
            )
        if key not in REPLACEABLE:
            raise ValueError(f"eval.py can replace {', '.join(REPLACEABLE)}; {key} is part of what was trained")
        cfg[key] = overrides.chosen(conf, key, str(override.value()))
        return
    if not override.is_add():
        overrides.check_key(cfg, key)
        overrides.check_type(cfg, key, override.value())
    if key.partition(".")[0] not in USED:
        raise ValueError(f"{key} has no effect on an evaluation; what has is in {', '.join(USED)}, ckpt and run.dir")
    OmegaConf.update(cfg, key, override.value(), force_add=override.is_add())


# Both


def make(node: DictConfig, **arguments: Any) -> Any:
    """Build what a part of a config describes."""
    return instantiate(node, **arguments, _convert_="all")


def read_data(cfg: DictConfig) -> Any:
    """Build the data of a config, and read what training and validation need."""
    data = make(cfg.data)
    data.order_seed = cfg.seed
    data.prepare_data()
    data.setup("fit")
    return data


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain values without secrets."""
    plain: dict[str, Any] = redacted(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    return plain


@contextmanager
def _closed_loggers() -> Iterator[None]:
    """Close a wandb run with the right exit code, whatever happens."""
    code = 1
    try:
        yield
        code = 0
    except Interrupted as interruption:
        code = interruption.code
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=code)
