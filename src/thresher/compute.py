"""Compute as something to measure, to bound and to report: one meter, one budget, one metric.

`ComputeMeter` collects the cost of every mechanism during a forward pass, `budgets.py` turns the ratio of sparse to
dense compute into a loss, and `ComputeRatio` averages it over an evaluation. All speak of one of two quantities:

    kept   pairs that received a weight / visible pairs
    macs   multiply-accumulates spent (selection included) / those of exact attention on the visible pairs
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor, nn
from torchmetrics import Metric

from thresher.attention.base import Attended, Cost, Metered
from thresher.attention.functional import straight_through

Quantity = Literal["kept", "macs"]


def check_quantity(quantity: str) -> Quantity:
    if quantity not in get_args(Quantity):
        raise ValueError(f"compute.quantity must be one of {', '.join(get_args(Quantity))}; got {quantity!r}")
    return quantity  # type: ignore[return-value]


def spent_and_allowance(costs: Iterable[Cost], quantity: Quantity) -> tuple[Tensor, Tensor]:
    """Sum what was spent and what dense attention would have spent, in pairs or in MACs."""
    pairs = [(c.kept, c.visible) if quantity == "kept" else (c.total, c.dense) for c in costs]
    if not pairs:
        raise ValueError("no attention ran: the meter needs a forward pass inside `with meter:`")
    return sum((a.sum() for a, _ in pairs), torch.zeros(())), sum((b.sum() for _, b in pairs), torch.zeros(()))


class ComputeMeter:
    """Collects the cost of every mechanism of a model while it is entered.

    Make it before `torch.compile`: hooks registered afterwards do not fire.

        meter = ComputeMeter(model)
        with meter:
            model(x)
        meter.kept()

    Args:
        model: A model with at least one mechanism inside.

    Attributes:
        calls: (name, cost) of each call since it was entered, in order; a module called twice appears twice.

    Raises:
        ValueError: The model holds no mechanism.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, Cost]] = []
        self._on = False
        mechanisms = {name: m for name, m in model.named_modules() if isinstance(m, Metered)}
        if not mechanisms:
            raise ValueError(f"{type(model).__name__} holds no mechanism to meter; sparsify() it first")
        for name, mechanism in mechanisms.items():
            mechanism.register_forward_hook(partial(self._collect, name))

    def _collect(self, name: str, module: nn.Module, args: Any, attended: Attended) -> None:
        if self._on:
            self.calls.append((name, attended.cost))

    def __enter__(self) -> "ComputeMeter":
        self.calls = []
        self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    def costs(self) -> list[Cost]:
        return [cost for _, cost in self.calls]

    def ratio(self, quantity: Quantity = "macs") -> Tensor:
        """Return spent / dense over all layers, heads, examples and processes, differentiable.

        Counts are summed over processes before the division, and gradients scaled so that the mean over
        processes that DDP takes is the gradient of that global ratio.
        """
        spent, allowance = spent_and_allowance(self.costs(), quantity)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            sums = torch.stack([spent.detach(), allowance.detach()])
            torch.distributed.all_reduce(sums)
            allowance = sums[1].clamp_min(1)
            return straight_through(sums[0] / allowance, spent * world / allowance)
        return spent / allowance.clamp_min(1)

    def kept(self) -> Tensor:
        """Return kept / visible pairs."""
        return self.ratio("kept")

    def fixed_ratio(self) -> float:
        """Return the share of dense MACs that is spent however little is kept (selection)."""
        return float(sum(c.select.sum() for c in self.costs()) / spent_and_allowance(self.costs(), "macs")[1])


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
        spent, dense = spent_and_allowance(costs, self.quantity)
        self.spent += spent.detach()
        self.dense += dense.detach()

    def compute(self) -> Tensor:
        return (self.spent / self.dense.clamp_min(1)).float()
