"""Evaluate a checkpoint on its test data, rebuilt from its own config."""

import shlex

import pytorch_lightning as pl

from thresher.callbacks.heads import HeadStatistics
from thresher.callbacks.progress import build_progress
from thresher.checkpoints.format import CLASSES, RECORD, STATE
from thresher.checkpoints.load import find_checkpoint
from thresher.checkpoints.weights import load_weights
from thresher.config.evaluation import EvaluationRequest
from thresher.explain.example import explain
from thresher.hosts.wrapped import exchange_for_adapter
from thresher.run import results
from thresher.run.build import (
    build_data,
    build_task,
    build_trainer,
    quiet_lightning,
    wrap_network,
)
from thresher.run.overrides import load_with_overrides
from thresher.run.run import Run, place_config


def evaluate(request: EvaluationRequest) -> dict[str, float]:
    """Test a checkpoint as a command line asks; return its metrics.

    Raises:
        ValueError: An override is wrong, or the checkpoint cannot be read, trusted or rebuilt.
        FileNotFoundError: There is no such checkpoint, or its data are not there.
    """
    quiet_lightning()
    path = find_checkpoint(request.checkpoint)
    config, checkpoint, other_attention = load_with_overrides(path, request.overrides, request.conf)
    folder = request.folder or results.choose_folder(path, "eval")
    run = Run(folder, place_config(config, folder), request.conf)
    results.create_folder(folder)
    pl.seed_everything(run.seed, workers=True, verbose=False)
    data = build_data(run.config, checkpoint[RECORD][CLASSES])
    data.setup("test")
    results.print_data(data)
    task = build_task(run.config, data)
    load_weights(task, checkpoint[STATE], other_attention)
    if request.adapter is not None:
        exchange_for_adapter(task.net, request.adapter)
        task = wrap_network(run.config, data, task.net)  # a task meters the mechanisms that it finds
    trainer = build_trainer(
        run.config,
        logger=False,
        callbacks=[HeadStatistics(str(folder / results.HEADS)), build_progress()],
        enable_checkpointing=False,
        default_root_dir=str(folder),
    )
    if trainer.is_global_zero:
        results.write_data(folder, data.summary())
    if request.examples and trainer.is_global_zero:  # before the test, which takes longer to fail
        explain(task.to(trainer.strategy.root_device), data, request.examples, folder / "explain")
    trainer.test(task, datamodule=data, verbose=False)
    metrics = results.write_metrics(folder, trainer.callback_metrics, trainer.is_global_zero)
    if trainer.is_global_zero:
        own = {"train": False, "ckpt_path": str(path)} | ({"adapter": request.adapter} if request.adapter else {})
        results.write_config(folder, run.plain_config | own)
        report = f"python -m thresher.report runs={shlex.quote(str(folder))}"
        commands = {"show its attention maps": report} if request.examples else {}
        results.print_results(f"{path}  →  {folder}", metrics, folder / results.HEADS, commands)
    return metrics
