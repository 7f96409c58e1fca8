"""`python eval.py experiment=dropin_...`: put every setting of every mechanism into one trained network in turn."""

import copy
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.utilities import rank_zero_only

from thresher.attention.contract import Pattern
from thresher.attention.shared.thresholds import named_thresholds
from thresher.budget.calibration import calibrate
from thresher.callbacks.progress import TimeLeft
from thresher.checkpoints.format import CLASSES, RECORD, STATE
from thresher.checkpoints.load import find_checkpoint
from thresher.checkpoints.weights import load_weights
from thresher.config import overrides
from thresher.config.evaluation import EvaluationRequest
from thresher.hosts import densify, inject
from thresher.run import results
from thresher.run.build import build, build_data, build_task, build_trainer, quiet_lightning
from thresher.run.dropin.embeddings import compare_embeddings, draw_texts, embed, embed_and_meter
from thresher.run.dropin.report import draw_rows, print_rows, write_rows
from thresher.run.dropin.settings import Setting, list_settings
from thresher.run.overrides import load_with_overrides
from thresher.run.run import Run, place_config

OWN = ("experiment", "dropin", "run")  # parts of the config that are not for the network, its data and its trainer
READ = ("model", "data", "trainer", "seed")  # what is read besides, where there is no checkpoint
TOKENS = ("vocabulary", "length", "padding")  # what a model of embeddings must know of the data
PASSES = 2  # of calibration: in the second, deep layers are read behind sparse ones

Measure = Callable[[Setting, DictConfig], dict[str, float]]


class Trial(NamedTuple):
    """A measurement of one setting, and the names of the numbers to draw."""

    measure: Measure
    drawn: tuple[str, ...]


def evaluate(request: EvaluationRequest) -> list[dict[str, Any]]:
    """Put every mechanism at every setting into a trained network, and measure the effect.

    Returns:
        A row for each setting: `attention`, `setting`, `kept`, `compute`, the measures and `seconds`.

    Raises:
        ValueError: An override is wrong, the experiment is a training, or a mechanism cannot run in the network.
        FileNotFoundError: The model, the checkpoint or the data are not there.
    """
    quiet_lightning()
    run, checkpoint = _open(request)
    settings = list_settings(OmegaConf.to_container(run.config.dropin.mechanisms))  # type: ignore[arg-type]
    nodes = [_build_node(setting, run.conf) for setting in settings]
    if not nodes:
        raise ValueError("dropin.mechanisms is empty: there is nothing to drop in")
    results.create_folder(run.folder)
    pl.seed_everything(run.seed, workers=True, verbose=False)
    trial = _measure_embeddings(run) if checkpoint is None else _measure_test(run, checkpoint)
    rows: list[dict[str, Any]] = []
    left = TimeLeft()
    left.start(0)
    for setting, node in zip(settings, nodes, strict=True):
        start = time.monotonic()
        measured = trial.measure(setting, node)
        row = {"attention": setting.attention, "setting": dict(setting.knobs), **measured}
        rows.append(row | {"seconds": time.monotonic() - start})
        write_rows(run.folder, rows)
        done = len(rows) / len(settings)
        numbers = "  ".join(f"{name} {measured[name]:.4f}" for name in ("kept", "compute", *trial.drawn))
        print(f"{done:4.0%}  {setting.attention} {setting}  {numbers}  left {left.format(done)}", flush=True)
    measures = [name for name in rows[0] if name not in ("attention", "setting", "kept", "compute", "seconds")]
    draw_rows(run.folder / "dropin.svg", rows, trial.drawn)
    results.write_config(run.folder, run.plain_config)
    print_rows(f"{run.title}/dropin.json, dropin.svg", rows, measures)
    return rows


def _open(request: EvaluationRequest) -> tuple[Run, dict[str, Any] | None]:
    """Open the run of an experiment; return it, and the checkpoint if there is one."""
    given, conf = request.overrides, request.conf
    if swept := [o.key_or_group for o in given if o.is_sweep_override()]:
        raise ValueError(f"eval.py takes one value for {swept[0]}; settings to compare go into dropin.mechanisms")
    if request.examples:
        raise ValueError("explain has no effect here: it is for one network, by eval.py ckpt=... explain=true")
    own = [o for o in given if o.key_or_group.partition(".")[0] in OWN]
    rest = [o for o in given if o not in own]
    if any(o.key_or_group.partition(".")[0] == "attention" for o in rest):
        raise ValueError("every mechanism is dropped in at its own settings: see dropin.mechanisms, not attention")
    composed = own if request.path is not None else [*own, *rest]
    overrides.check_overrides(conf, "train", composed)
    experiment = overrides.compose_config(conf, "train", [str(o.input_line) for o in composed])
    name = f"experiment={request.experiment}"
    if "dropin" not in experiment:
        raise ValueError(f"{name} is a training: python train.py {name}, then python eval.py ckpt=...")
    if experiment.dropin.needs_checkpoint and request.path is None:
        raise ValueError(f"{name} needs a checkpoint: python eval.py {name} ckpt=runs/.../checkpoints/best.ckpt")
    if request.path is not None:
        if not experiment.dropin.needs_checkpoint:
            raise ValueError(f"{name} names its model itself; for a checkpoint there is experiment=dropin_vit")
        path = find_checkpoint(request.path)
        config, checkpoint, _ = load_with_overrides(path, rest, conf)
        with open_dict(config):
            config.dropin, config.run.name = experiment.dropin, experiment.run.name
        folder = request.folder or results.choose_folder(path, "dropin")
        return Run(folder, place_config(config, folder), conf), checkpoint
    if idle := [o.key_or_group for o in rest if o.key_or_group.partition(".")[0] not in READ]:
        raise ValueError(f"{idle[0]} has no effect here; what has is in {', '.join(READ)}, dropin and run.dir")
    folder = request.folder or Path(experiment.run.dir)
    return Run(folder, place_config(experiment, folder), conf), None


def _measure_embeddings(run: Run) -> Trial:
    """Measure how far the embeddings of texts move from those of the original model."""
    cfg = run.config
    data = _read_test_data(run, None)
    device = _build_quiet_trainer(cfg).strategy.root_device
    size = {name: data.model_arguments[name] for name in TOKENS}
    texts = draw_texts(data, data.test_dataloader(), cfg.dropin.texts, run.seed)
    calibration = draw_texts(data, data.val_dataloader(), cfg.dropin.calibration * data.batch_size, run.seed)
    dense = _replace_attention(cfg, _build_node(Setting("dense", {}), run.conf))
    original = build(dense.model, **size).to(device).eval()
    densify(original)
    before = embed(original, texts, device)

    def measure(setting: Setting, node: DictConfig) -> dict[str, float]:
        net = copy.deepcopy(original)
        inject(net, build(node), where=cfg.model.where)
        if setting.kept is not None:
            for _ in range(PASSES):
                calibrate(net, (tokens.to(device) for tokens in calibration), setting.kept)
        embeddings, costs = embed_and_meter(net, texts, device)
        return costs | compare_embeddings(embeddings, before)

    return Trial(measure, ("cosine", "spearman"))


def _measure_test(run: Run, checkpoint: dict[str, Any]) -> Trial:
    """Measure the network of a checkpoint on its test data."""
    data = _read_test_data(run, checkpoint[RECORD][CLASSES])
    trainer = _build_quiet_trainer(run.config)
    device = trainer.strategy.root_device
    calibration = list(itertools.islice(data.val_dataloader(), run.config.dropin.calibration))

    def measure(setting: Setting, node: DictConfig) -> dict[str, float]:
        task = build_task(_replace_attention(run.config, node), data)
        load_weights(task, checkpoint[STATE], other_attention=True)
        if setting.kept is not None:
            task.to(device).eval()
            for _ in range(PASSES):
                batches = (task.transfer_batch_to_device(batch, device, 0) for batch in calibration)
                calibrate(task.net, batches, setting.kept, forward=task.step)
        trainer.test(task, datamodule=data, verbose=False)
        return {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}

    return Trial(measure, (build_task(run.config, data).metric,))


def _read_test_data(run: Run, classes: list[str] | None) -> Any:
    """Read the data for the test, print a summary and write it."""
    data = build_data(run.config, classes)
    data.setup("test")
    results.print_data(data)
    if getattr(rank_zero_only, "rank", 0) == 0:
        results.write_data(run.folder, data.summary())
    return data


def _build_quiet_trainer(cfg: DictConfig) -> pl.Trainer:
    return build_trainer(cfg, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _replace_attention(cfg: DictConfig, node: DictConfig) -> DictConfig:
    """Copy a config, with another mechanism."""
    replaced = copy.deepcopy(cfg)
    replaced.attention = node
    return replaced


def _build_node(setting: Setting, conf: Path) -> DictConfig:
    """Build the config of a mechanism, and check that the mechanism can be built.

    Raises:
        ValueError: It cannot; the message names the hyper-parameter.
    """
    where = f"dropin.mechanisms.{setting.attention}"
    node = copy.deepcopy(_compose_attention(conf, setting.attention))
    for name, value in setting.hyperparameters.items():
        if name not in node:
            options = ", ".join(str(key) for key in node if not str(key).startswith("_")) or "none"
            raise ValueError(f"{where}.{name}: {setting.attention} has no such hyper-parameter; it has: {options}")
        node[name] = value
    mechanism = build(node)(num_heads=1, head_dim=32, pattern=Pattern.NONCAUSAL_SELF)
    if setting.kept is not None and not dict(named_thresholds(mechanism)):
        raise ValueError(f"{where}.kept: {setting.attention} has no thresholds that could be calibrated")
    return node


@functools.cache
def _compose_attention(conf: Path, name: str) -> DictConfig:
    return overrides.compose_choice(conf, "attention", name)
