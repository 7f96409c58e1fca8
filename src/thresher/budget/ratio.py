"""The metric of compute, apart from the meter: torchmetrics takes seconds to import."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from thresher.attention.contract import Cost
from thresher.budget.meter import Quantity, check_quantity, sum_compute


class ComputeRatio(Metric):
    """Average of spent / dense over an evaluation, by pairs or MACs (not by batches).

    Args:
        quantity: "kept" or "macs".
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    spent: Tensor
    dense: Tensor

    def __init__(self, quantity: Quantity = "macs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantity: Quantity = check_quantity(quantity)
        self.add_state("spent", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("dense", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, costs: Iterable[Cost]) -> None:
        """Add the costs of one forward pass, for example `meter.costs()`."""
        spent, dense = sum_compute(costs, self.quantity)
        self.spent += spent.detach()
        self.dense += dense.detach()

    def compute(self) -> Tensor:
        return (self.spent / self.dense.clamp_min(1)).float()
