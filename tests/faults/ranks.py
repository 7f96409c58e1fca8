"""A callback that writes down what each process of a training has and draws."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class Ranks(pl.Callback):
    """Write the weights of each process at the end, and what its network makes of one input after each forward pass.

    Args:
        folder: Where to.
        fails: The process that raises in the third step, if one does.
    """

    def __init__(self, folder: str, fails: int | None = None) -> None:
        self.folder, self.fails = Path(folder), fails
        self.draws: list[Tensor] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if trainer.global_rank == self.fails and trainer.global_step == 2:
            raise RuntimeError(f"process {self.fails} broke")
        with torch.random.fork_rng([]), torch.no_grad():
            net: Any = pl_module.net
            self.draws.append(net(torch.linspace(-1, 1, 28 * 28).reshape(1, 1, 28, 28)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"state": dict(pl_module.net.state_dict()), "draws": self.draws}  # type: ignore[operator, union-attr]
        torch.save(kept, self.folder / f"{trainer.global_rank}.pt")
