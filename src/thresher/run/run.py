"""The run of a command: its folder, config, start and signals, built once and passed on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thresher.checkpoints.resume import Start, find_start
from thresher.config.redact import redact
from thresher.signals import Signals


@dataclass(frozen=True)
class Run:
    """The run of a command.

    Attributes:
        folder: Where it writes.
        config: Its config, whose `run.dir` is the folder.
        conf: The folder of the configs, by which its checkpoints name what they are rebuilt from.
        overrides: The overrides of the command line, or None where the config came without one.
        start: Where its training starts.
        signals: The signals that stop its training.
    """

    folder: Path
    config: DictConfig
    conf: Path
    overrides: tuple[str, ...] | None = None
    start: Start = field(default_factory=Start)
    signals: Signals = field(default_factory=Signals)

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """The config in plain values, resolved and without secrets: what is stored, logged and compared."""
        return resolve_config(self.config)

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return int(self.config.seed)

    @property
    def title(self) -> str:
        """The name and the folder, for the results on a terminal."""
        return f"{self.config.run.name}  →  {self.folder}"


def open_run(cfg: DictConfig, conf: Path, folder: str | None = None, overrides: Sequence[str] | None = None) -> Run:
    """Open the run of a training: create its folder, and find where it starts.

    Args:
        cfg: The composed config.
        conf: The folder of the configs.
        folder: Where the run writes; by default `run.dir` of the config.
        overrides: The overrides of the command line.

    Raises:
        ValueError: The folder holds another run, or no snapshot of it is good.
        FileNotFoundError: There is no such snapshot.
    """
    path = Path(cfg.run.dir if folder is None else folder)
    config = place_config(cfg, path)
    path.mkdir(parents=True, exist_ok=True)
    start = find_start(resolve_config(config), path, conf)
    return Run(path, config, conf, None if overrides is None else tuple(overrides), start)


def place_config(cfg: DictConfig, folder: str | Path) -> DictConfig:
    """Copy a config, with another folder for its run."""
    placed = copy.deepcopy(cfg)
    OmegaConf.update(placed, "run.dir", str(folder))
    return placed


def resolve_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain values without secrets."""
    plain: dict[str, Any] = redact(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    return plain
