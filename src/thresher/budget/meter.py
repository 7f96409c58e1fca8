"""Measure compute: a meter of forward passes.

`ComputeMeter` collects the cost and the auxiliary losses of every mechanism during a forward pass, `budgets.py` turns
the ratio of sparse to dense compute into a loss, `auxiliary.py` weighs the losses, and `ratio.py` averages the ratio
over an evaluation. All speak of one of two quantities:

    kept   pairs that received a weight / visible pairs
    macs   multiply-accumulates spent (selection included) / those of exact attention on the visible pairs
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor, nn

from thresher.attention.contract import Attended, Cost
from thresher.attention.mechanism import Metered
from thresher.attention.shared.functional import straight_through
from thresher.budget.auxiliary import collect_weights

Quantity = Literal["kept", "macs"]


def check_quantity(quantity: str) -> Quantity:
    if quantity not in get_args(Quantity):
        raise ValueError(f"compute.quantity must be one of {', '.join(get_args(Quantity))}; got {quantity!r}")
    return quantity  # type: ignore[return-value]


def sum_compute(costs: Iterable[Cost], quantity: Quantity) -> tuple[Tensor, Tensor]:
    """Sum what was spent and what dense attention would have spent, in pairs or in MACs."""
    pairs = [(c.kept, c.visible) if quantity == "kept" else (c.total, c.dense) for c in costs]
    if not pairs:
        raise ValueError("no attention ran: the meter needs a forward pass inside `with meter:`")
    return sum((a.sum() for a, _ in pairs), torch.zeros(())), sum((b.sum() for _, b in pairs), torch.zeros(()))


class ComputeMeter:
    """Collects the cost and the auxiliary losses of every mechanism of a model while it is entered.

    Create it before `torch.compile`: later hooks do not fire. What gradient checkpointing recomputes in backward is not
    counted again; with `use_reentrant=True` costs have no gradient, and backward of a ratio says so.

        meter = ComputeMeter(model)
        with meter:
            model(x)
        meter.kept()

    Args:
        model: A model with at least one mechanism inside.

    Attributes:
        calls: (name, cost) of each call since entry, in order; a module called twice appears twice.
        weights: Names of the auxiliary losses that modules of the model may have, and the weights that they state.

    Raises:
        ValueError: The model holds no mechanism.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, Cost]] = []
        self._losses: list[Mapping[str, Tensor]] = []
        self._on = self._wants_gradient = False
        self._without_gradient: set[str] = set()
        self._without_losses: set[str] = set()
        mechanisms = {name: m for name, m in model.named_modules() if isinstance(m, Metered)}
        if not mechanisms:
            raise ValueError(f"{type(model).__name__} holds no mechanism to meter; sparsify() it first")
        self.weights = collect_weights(mechanisms.values())
        for name, mechanism in mechanisms.items():
            mechanism.register_forward_hook(partial(self._collect, name))

    def _collect(self, name: str, module: nn.Module, args: Any, attended: Attended) -> None:
        if self._on and not _in_backward():
            self.calls.append((name, attended.cost))
            self._losses.append(attended.losses)
            lost = self._wants_gradient and not torch.is_grad_enabled()
            if lost and any(parameter.requires_grad for parameter in module.parameters()):
                self._without_gradient.add(name)
                if module.auxiliary:
                    self._without_losses.add(name)

    def __enter__(self) -> "ComputeMeter":
        self.calls, self._losses = [], []
        self._on, self._wants_gradient = True, torch.is_grad_enabled()
        self._without_gradient, self._without_losses = set(), set()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    def costs(self) -> list[Cost]:
        return [cost for _, cost in self.calls]

    def losses(self) -> dict[str, Tensor]:
        """Average each auxiliary loss over layers, heads and examples, differentiably; none without gradients.

        Raises:
            ValueError: Gradients were on at entry, but a module with such losses ran without.
        """
        if self._without_losses:
            names = ", ".join(sorted(self._without_losses))
            raise ValueError(
                f"{names} ran under torch.no_grad(), so auxiliary losses are missing: set use_reentrant=False in "
                "gradient checkpointing (True runs the forward without gradients), or enter the meter without gradients"
            )
        found: dict[str, list[Tensor]] = {}
        for losses in self._losses:
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss.mean())
        return {name: torch.stack(each).mean() for name, each in found.items()}

    def ratio(self, quantity: Quantity = "macs") -> Tensor:
        """Compute spent / dense over all layers, heads, examples and processes, differentiably.

        Counts are summed over processes before the division, and gradients scaled so that the mean over
        processes that DDP takes is the gradient of that global ratio. If mechanisms with parameters ran without
        gradient although it was on at entry, backward raises ValueError if no other cost has a gradient; otherwise a
        warning names them.
        """
        spent, allowance = sum_compute(self.costs(), quantity)
        if self._without_gradient and torch.is_grad_enabled():
            if spent.requires_grad:
                names = ", ".join(sorted(self._without_gradient))
                warnings.warn(f"a budget does not reach {names}: measured under torch.no_grad()", stacklevel=2)
            else:
                spent = _WithoutGradient.apply(spent, spent.new_zeros((), requires_grad=True))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            sums = torch.stack([spent.detach(), allowance.detach()])
            torch.distributed.all_reduce(sums)
            allowance = sums[1].clamp_min(1)
            return straight_through(sums[0] / allowance, spent * world / allowance)
        return spent / allowance.clamp_min(1)

    def kept(self) -> Tensor:
        """Compute kept / visible pairs."""
        return self.ratio("kept")

    def fixed_ratio(self) -> float:
        """Compute the share of dense MACs that selection spends, however little is kept."""
        return float(sum(c.select.sum() for c in self.costs()) / sum_compute(self.costs(), "macs")[1])


def _in_backward() -> bool:
    """Tell whether autograd's engine runs this code, as when checkpointing recomputes a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _WithoutGradient(torch.autograd.Function):
    """A count measured without a gradient: backward raises an error that says so."""

    @staticmethod
    def forward(ctx: Any, count: Tensor, leaf: Tensor) -> Tensor:
        return count.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise ValueError(
            "a budget asks for the gradient of compute, but mechanisms were measured without gradients: set "
            "use_reentrant=False in gradient checkpointing (True runs the forward under torch.no_grad()), or measure "
            "outside of torch.no_grad()"
        )
