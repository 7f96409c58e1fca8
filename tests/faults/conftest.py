"""A short real training, and its checkpoint to do harm to."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import tiny_config
from thresher.run import train as training
from thresher.tools.export.run import export

SHORT = ("trainer.max_epochs=1", "trainer.limit_val_batches=1", "callbacks=none")
SAVED = (
    "+callbacks.checkpoint._target_=pytorch_lightning.callbacks.ModelCheckpoint",
    "+callbacks.checkpoint.dirpath=${run.dir}/checkpoints",
    "+callbacks.checkpoint.filename=best",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with trained thresholds."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    training.train(tiny_config(folder, *SHORT, *SAVED, "attention.gate.surrogate=sigmoid"))
    return folder


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an export of that run."""
    return export(trained, str(tmp_path_factory.mktemp("exported") / "out"), "safetensors")


@pytest.fixture(scope="session")
def plain(trained: Path) -> dict[str, Any]:
    """Return the checkpoint of that run."""
    checkpoint: dict[str, Any] = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    return checkpoint


@pytest.fixture
def harmed(plain: dict[str, Any], tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Return a function that writes the checkpoint with a change made to it."""

    def write(change: Callable[[dict[str, Any]], None]) -> Path:
        checkpoint = copy.deepcopy(plain)
        change(checkpoint)
        path = tmp_path / "stranger.ckpt"
        torch.save(checkpoint, path)
        return path

    return write
