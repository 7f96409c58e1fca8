"""Write checkpoints atomically, with a checksum and the record that rebuilds their network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO

from thresher.checkpoints import files
from thresher.checkpoints.format import LAST, PREVIOUS, RECORD, STATE
from thresher.checkpoints.load import load_checkpoint, read_weights

HANDED_OVER = ".temp.ckpt"  # Lightning's name for the bare weights that a spawned process hands to the first one


class CheckpointFiles(CheckpointIO):
    """Writes checkpoints that are whole or absent, and reads those of this project.

    The last snapshot stays as `previous.ckpt` when a new one replaces it.

    Args:
        record: What each checkpoint carries to be rebuilt from (`format.build_record`).
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = dict(record)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = checkpoint | {RECORD: self.record} if STATE in checkpoint else checkpoint
        previous = path.with_name(PREVIOUS) if path.name == LAST else None
        files.write_with_checksum(path, lambda file: torch.save(whole, file), previous)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_weights(Path(path)) if Path(path).name == HANDED_OVER else load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        files.remove_with_checksum(Path(path))
