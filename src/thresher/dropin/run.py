"""`python eval.py experiment=dropin_...`: every setting of every mechanism, put into one trained network in turn."""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf, open_dict

from thresher import cli, overrides
from thresher.attention.base import Pattern
from thresher.attention.thresholds import Thresholds
from thresher.calibration import calibrate
from thresher.callbacks.progress import TimeLeft
from thresher.checkpoint import RECORD, load_weights
from thresher.dropin.embeddings import draw_texts, embed, embed_metered, movement
from thresher.dropin.report import draw_rows, print_rows, write_rows
from thresher.dropin.settings import Setting, settings_of
from thresher.hosts import densify, inject
from thresher.results import evaluation_folder, new_folder
from thresher.trainers import make_trainer

OWN = ("experiment", "dropin", "run")  # overrides that are not for the network, its data and its trainer
READ = ("model", "data", "trainer", "seed")  # what is read besides, where there is no checkpoint
TOKENS = ("vocabulary", "length", "padding")  # what a model of embeddings must know of the data
PASSES = 2  # of calibration: in the second, deep layers are read behind sparse ones


class Trial(NamedTuple):
    """How one setting is measured, and which of the numbers are drawn."""

    measure: Callable[[Setting], dict[str, float]]
    drawn: tuple[str, ...]


def evaluate(arguments: Sequence[str], conf: Path) -> list[dict[str, Any]]:
    """Put every mechanism at every setting into a trained network, and measure what that does to it.

    Returns:
        A row for each setting: `attention`, `setting`, `kept`, `compute`, the measures and `seconds`.

    Raises:
        ValueError: An override is wrong, the experiment is a training, or a mechanism cannot run in the network.
        FileNotFoundError: The model, the checkpoint or the data are not there.
    """
    cli.quiet_lightning()
    cfg, checkpoint, folder = _config(overrides.parse(arguments), conf)
    settings = settings_of(OmegaConf.to_container(cfg.dropin.mechanisms))  # type: ignore[arg-type]
    nodes = [_node(setting, conf) for setting in settings]
    if not nodes:
        raise ValueError("dropin.mechanisms is empty: there is nothing to drop in")
    new_folder(folder)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    trial = _of_embeddings(cfg, conf) if checkpoint is None else _of_test(cfg, checkpoint)
    rows: list[dict[str, Any]] = []
    left = TimeLeft()
    left.start(0)
    for setting, cfg.attention in zip(settings, nodes, strict=True):
        start = time.monotonic()
        measured = trial.measure(setting)
        row = {"attention": setting.attention, "setting": dict(setting.knobs), **measured}
        rows.append(row | {"seconds": time.monotonic() - start})
        write_rows(folder, rows)
        done = len(rows) / len(settings)
        numbers = "  ".join(f"{name} {measured[name]:.4f}" for name in ("kept", "compute", *trial.drawn))
        print(f"{done:4.0%}  {setting.attention} {setting}  {numbers}  left {left.text(done)}", flush=True)
    measures = [name for name in rows[0] if name not in ("attention", "setting", "kept", "compute", "seconds")]
    draw_rows(folder / "dropin.svg", rows, trial.drawn)
    OmegaConf.save(OmegaConf.create(cli.plain_config(cfg)), folder / "config.yaml")
    print_rows(f"{cfg.run.name}  →  {folder}/dropin.json, dropin.svg", rows, measures)
    return rows


def _config(given: Sequence[Any], conf: Path) -> tuple[DictConfig, dict[str, Any] | None, Path]:
    """Return the config of network and experiment, the checkpoint if there is one, and where to write."""
    if swept := [o.key_or_group for o in given if o.is_sweep_override()]:
        raise ValueError(f"eval.py takes one value for {swept[0]}; settings to compare go into dropin.mechanisms")
    value = {o.key_or_group: o.value() for o in given}
    if "ckpt" in value and value["ckpt"] is None:
        raise ValueError("which checkpoint? ckpt=runs/.../checkpoints/best.ckpt")
    own = [o for o in given if o.key_or_group.partition(".")[0] in OWN]
    rest = [o for o in given if o not in own and o.key_or_group != "ckpt"]
    if any(o.key_or_group.partition(".")[0] == "attention" for o in rest):
        raise ValueError("every mechanism is dropped in at its own settings: see dropin.mechanisms, not attention")
    lines = [o.input_line for o in (own if "ckpt" in value else [*own, *rest])]
    overrides.check(conf, "train", lines)
    experiment = overrides.compose_config(conf, "train", lines)
    name = f"experiment={value['experiment']}"
    if "dropin" not in experiment:
        raise ValueError(f"{name} is a training: python train.py {name}, then python eval.py ckpt=...")
    if experiment.dropin.needs_checkpoint and "ckpt" not in value:
        raise ValueError(f"{name} needs a checkpoint: python eval.py {name} ckpt=runs/.../checkpoints/best.ckpt")
    if "ckpt" in value:
        if not experiment.dropin.needs_checkpoint:
            raise ValueError(f"{name} names its model itself; for a checkpoint there is experiment=dropin_vit")
        path = Path(str(value["ckpt"]))
        cfg, checkpoint, _ = cli.rebuilt(path, rest, conf)
        folder = Path(str(value.get("run.dir") or evaluation_folder(path, "dropin")))
        with open_dict(cfg):
            cfg.dropin, cfg.run.dir, cfg.run.name = experiment.dropin, str(folder), experiment.run.name
        return cfg, checkpoint, folder
    if idle := [o.key_or_group for o in rest if o.key_or_group.partition(".")[0] not in READ]:
        raise ValueError(f"{idle[0]} has no effect here; what has is in {', '.join(READ)}, dropin and run.dir")
    return experiment, None, Path(experiment.run.dir)


def _of_embeddings(cfg: DictConfig, conf: Path) -> Trial:
    """Measure how far the embeddings of texts move from those of the model as it was."""
    data = cli.read_data(cfg)
    device = _trainer(cfg).strategy.root_device
    size = {name: data.model_arguments[name] for name in TOKENS}
    texts = draw_texts(data, data.test_dataloader(), cfg.dropin.texts, cfg.seed)
    read = draw_texts(data, data.val_dataloader(), cfg.dropin.calibration * data.batch_size, cfg.seed)
    cfg.attention = _node(Setting("dense", {}), conf)
    original = cli.make(cfg.model, **size).to(device).eval()
    densify(original)
    before = embed(original, texts, device)

    def measure(setting: Setting) -> dict[str, float]:
        net = copy.deepcopy(original)
        inject(net, cli.make(cfg.attention), where=cfg.model.where)
        if setting.kept is not None:
            for _ in range(PASSES):
                calibrate(net, (tokens.to(device) for tokens in read), setting.kept)
        embeddings, costs = embed_metered(net, texts, device)
        return costs | movement(embeddings, before)

    return Trial(measure, ("cosine", "spearman"))


def _of_test(cfg: DictConfig, checkpoint: Mapping[str, Any]) -> Trial:
    """Measure what the network of a checkpoint reaches on its test data."""
    data = cli.data_of(cfg, checkpoint[RECORD]["classes"])
    trainer = _trainer(cfg)
    device = trainer.strategy.root_device
    read = list(itertools.islice(data.val_dataloader(), cfg.dropin.calibration))

    def measure(setting: Setting) -> dict[str, float]:
        task = cli.build_task(cfg, data)
        load_weights(task, checkpoint["state_dict"], other_attention=True)
        if setting.kept is not None:
            task.to(device).eval()
            for _ in range(PASSES):
                batches = (task.transfer_batch_to_device(batch, device, 0) for batch in read)
                calibrate(task.net, batches, setting.kept, forward=task.step)
        trainer.test(task, datamodule=data, verbose=False)
        return {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}

    return Trial(measure, (cli.build_task(cfg, data).metric,))


def _trainer(cfg: DictConfig) -> pl.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return make_trainer(cli.make(cfg.trainer), logger=False, **quiet)


def _node(setting: Setting, conf: Path) -> DictConfig:
    """Return the config of a mechanism, once it is clear that it can be built."""
    where = f"dropin.mechanisms.{setting.attention}"
    node = copy.deepcopy(_attention(conf, setting.attention))
    for name, value in setting.hyperparameters.items():
        if name not in node:
            options = ", ".join(str(key) for key in node if not str(key).startswith("_")) or "none"
            raise ValueError(f"{where}.{name}: {setting.attention} has no such hyper-parameter; it has: {options}")
        node[name] = value
    mechanism = cli.make(node)(num_heads=1, head_dim=32, pattern=Pattern.NONCAUSAL_SELF)
    if setting.kept is not None and not any(isinstance(m, Thresholds) for m in mechanism.modules()):
        raise ValueError(f"{where}.kept: {setting.attention} has no thresholds that could be calibrated")
    return node


@functools.cache
def _attention(conf: Path, name: str) -> DictConfig:
    return overrides.chosen(conf, "attention", name)
