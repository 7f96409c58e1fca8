"""How a training writes its checkpoints: whole or not at all, with a checksum, and read back executing nothing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO

from thresher import checkpoint, files

HANDED_OVER = ".temp.ckpt"  # Lightning's name for bare weights that a spawned process hands to the first one


class CheckpointFiles(CheckpointIO):
    """Writes checkpoints that are whole or not there, and reads those of this project.

    Args:
        previous: For the names of files that are replaced, the names under which the replaced ones stay.
    """

    def __init__(self, previous: Mapping[str, str] | None = None) -> None:
        self.previous = dict(previous or {})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.previous.get(path.name)
        files.write_checked(path, lambda file: torch.save(checkpoint, file), path.with_name(kept) if kept else None)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoint.read(Path(path)) if Path(path).name == HANDED_OVER else checkpoint.load(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        files.remove_checked(Path(path))
