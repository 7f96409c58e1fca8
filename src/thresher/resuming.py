"""Where a training begins: anew, or from the newest good snapshot of its folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from thresher import checkpoint, files

NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"
# What may change without another training: what is left to do, how it is told, and what spreads the work.
FREE = ("run", "tags", "resume", "train", "test", "ckpt_path", "init_from", "logger", "callbacks", "optimized_metric")
SPREAD = ("trainer", "data.batch_size", "data.workers", "compile")


class Beginning(NamedTuple):
    """Where a training begins.

    Attributes:
        path: The snapshot that it goes on from, or None.
        rows: How many rows of the CSV logs come before it.
        wandb: The run of wandb that it goes on with, or None.
    """

    path: Path | None = None
    rows: tuple[int, ...] = ()
    wandb: str | None = None


def run_folder(cfg: DictConfig) -> Path:
    """Make the folder of the run and return it."""
    if HydraConfig.initialized():
        # Hydra knows the folder of each job of a sweep, and Lightning tells it to the processes that it starts.
        cfg.run.dir = os.path.relpath(HydraConfig.get().runtime.output_dir)
    folder = Path(cfg.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def beginning(cfg: DictConfig, config: Mapping[str, Any], folder: Path) -> Beginning:
    """Find where the training of `config` begins, as `cfg.resume` says: "auto", "never" or a path.

    Raises:
        FileNotFoundError: There is no such snapshot.
        ValueError: The folder holds another run, or no snapshot of it is good.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        for place in (folder, folder / "checkpoints"):
            files.remove_leftovers(place)
    if not cfg.train:
        return Beginning()
    if cfg.ckpt_path is not None:
        raise ValueError("ckpt_path is what train=false tests; a training goes on from resume=PATH")
    begun = folder / "config.yaml"
    if cfg.resume == "never":
        if first and begun.exists():
            raise ValueError(f"{folder} already holds a run: choose another run.dir, or go on with it by resume=auto")
        return Beginning()
    if cfg.resume != "auto":
        path = Path(str(cfg.resume))
        loaded = checkpoint.load(path)
        changes = changed(loaded[checkpoint.RECORD]["config"], config, ())
        if changes:
            rank_zero_warn(f"the training goes on with other settings than it began with: {', '.join(changes)}")
        own = folder.resolve() in path.resolve().parents
        return _from(path, loaded, own)
    if not begun.exists():
        return Beginning()
    _refuse_another(folder, OmegaConf.to_container(OmegaConf.load(begun)), config)
    return _newest(folder / "checkpoints")


def save_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write the config of a run; that of a continuation with other settings stands beside the first one."""
    path, text = folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    earlier = sorted(folder.glob("config*.yaml"))
    if any(each.read_text() == text for each in earlier):
        return
    files.write_text(path.with_stem(f"config_{len(earlier)}") if earlier else path, text)


def changed(before: Any, now: Any, free: tuple[str, ...], key: str = "") -> list[str]:
    """Return how two configs differ, as "key: before → now", except below the keys that are free."""
    if key in (*FREE, *free):
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*now, *(k for k in before if k not in now)]
        return [
            each for k in keys for each in changed(before.get(k), now.get(k), free, f"{key}.{k}" if key else str(k))
        ]
    return [] if before == now else [f"{key}: {before} → {now}"]


def _refuse_another(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    if changes := changed(before, now, SPREAD):
        raise ValueError(
            f"{folder} already holds a run with other settings ({'; '.join(changes[:4])}{' …' * (len(changes) > 4)}): "
            "choose another run.dir, or go on with these settings by resume=PATH of its last.ckpt"
        )
    if changes := changed(before, now, ()):
        rank_zero_warn(f"the training goes on, but not as it would have without the interruption: {', '.join(changes)}")


def _newest(folder: Path) -> Beginning:
    """Return the newest snapshot that can be read; say so where that is not the last one."""
    damaged = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.is_file():
            try:
                found = _from(path, checkpoint.load(path), own=True)
            except ValueError as error:
                damaged.append(path.name)
                rank_zero_warn(f"{error}. Going on from the snapshot before it")
                continue
            rank_zero_info(f"goes on from {path}")
            return found
    if damaged:
        raise ValueError(f"no snapshot in {folder} is good ({', '.join(damaged)}): begin anew in another run.dir")
    rank_zero_info("this run had begun, but has no snapshot yet: it begins anew")
    return Beginning()


def _from(path: Path, loaded: Mapping[str, Any], own: bool) -> Beginning:
    rows = loaded.get("position", {}).get("rows", []) if own else []
    return Beginning(path, tuple(rows), loaded[checkpoint.RECORD].get("loggers", {}).get("wandb"))
