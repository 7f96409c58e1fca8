"""Find where a training starts: anew, or from the newest good snapshot of its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from thresher.checkpoints import files
from thresher.checkpoints.format import (
    CONFIG,
    FOLDER,
    LAST,
    LOGGERS,
    POSITION,
    PREVIOUS,
    RECORD,
    TUNING,
    TUNING_LOGGERS,
)
from thresher.checkpoints.groups import restore_config
from thresher.checkpoints.load import load_checkpoint

# Keys that do not change the training: remaining steps, reports, distribution of the work.
NOT_TRAINING = (
    *("run", "tags", "resume", "train", "test", "ckpt_path", "init_from", "init_mechanisms"),
    *("logger", "callbacks", "optimized_metric"),
)
DISTRIBUTION = ("trainer", "data.batch_size", "data.workers", "compile")


class Start(NamedTuple):
    """The start of a training: anew, or at a snapshot.

    Attributes:
        path: The snapshot that it resumes, or None.
        rows: How many rows of the CSV logs come before it.
        wandb: The run of wandb that it continues, or None.
    """

    path: Path | None = None
    rows: tuple[int, ...] = ()
    wandb: str | None = None


def find_start(config: Mapping[str, Any], folder: Path, conf: Path) -> Start:
    """Find where the training of a config starts, as its key `resume` says: "auto", "never" or a path.

    Args:
        config: The resolved config of the run.
        folder: The folder of the run.
        conf: The folder of the configs.

    Raises:
        FileNotFoundError: There is no such snapshot.
        ValueError: The folder holds another run, or no snapshot of it is good.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        for place in (folder, folder / FOLDER):
            files.remove_leftovers(place)
    if not config["train"]:
        return Start()
    if config["ckpt_path"] is not None:
        raise ValueError("ckpt_path is what train=false tests; a training resumes by resume=PATH")
    stored, resume = folder / "config.yaml", config["resume"]
    if resume == "never":
        if first and stored.exists():
            raise ValueError(f"{folder} already holds a run: choose another run.dir, or continue it by resume=auto")
        return Start()
    if resume != "auto":
        path = Path(str(resume))
        checkpoint = load_checkpoint(path)
        before = OmegaConf.create(restore_config(checkpoint[RECORD][CONFIG], conf, path))
        if changes := list_changes(OmegaConf.to_container(before, resolve=True), config, ()):
            rank_zero_warn(f"the training continues with other settings than it began with: {', '.join(changes)}")
        return _start_from(path, checkpoint, own=folder.resolve() in path.resolve().parents)
    if not stored.exists():
        return Start()
    _refuse_another(folder, OmegaConf.to_container(OmegaConf.load(stored)), config)
    if (folder / TUNING).exists():
        rank_zero_info(f"resumes from {folder / TUNING}")
        return Start(wandb=_read_wandb_id(folder / TUNING_LOGGERS))
    return _find_newest(folder / FOLDER)


def list_changes(before: Any, now: Any, free: tuple[str, ...], key: str = "") -> list[str]:
    """List the differences of two configs as "key: before → now", except below `free` keys."""
    if key in (*NOT_TRAINING, *free):
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*now, *(k for k in before if k not in now)]
        return [
            each
            for k in keys
            for each in list_changes(before.get(k), now.get(k), free, f"{key}.{k}" if key else str(k))
        ]
    return [] if before == now else [f"{key}: {before} → {now}"]


def _refuse_another(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    if changes := list_changes(before, now, DISTRIBUTION):
        raise ValueError(
            f"{folder} already holds a run with other settings ({'; '.join(changes[:4])}{' …' * (len(changes) > 4)}): "
            "choose another run.dir, or continue with these settings by resume=PATH of its last.ckpt"
        )
    if changes := list_changes(before, now, ()):
        rank_zero_warn(
            f"the training continues, but not as it would have without the interruption: {', '.join(changes)}"
        )


def _read_wandb_id(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("wandb")
    except (ValueError, AttributeError, RecursionError) as error:
        rank_zero_warn(f"{path} is damaged ({error}): wandb begins another run")
        return None
    return found if isinstance(found, str) else None


def _find_newest(folder: Path) -> Start:
    """Find the newest readable snapshot, and warn if it is not the last one."""
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.is_file():
            try:
                start = _start_from(path, load_checkpoint(path), own=True)
            except ValueError as error:
                damaged.append(path.name)
                rank_zero_warn(f"{error}. Resuming from the snapshot before it")
                continue
            rank_zero_info(f"resumes from {path}")
            return start
    if damaged:
        raise ValueError(f"no snapshot in {folder} is good ({', '.join(damaged)}): start again in another run.dir")
    rank_zero_info("this run has no snapshot yet: it starts from the beginning")
    return Start()


def _start_from(path: Path, checkpoint: Mapping[str, Any], own: bool) -> Start:
    rows = checkpoint.get(POSITION, {}).get("rows", []) if own else []
    return Start(path, tuple(rows), checkpoint[RECORD].get(LOGGERS, {}).get("wandb"))
