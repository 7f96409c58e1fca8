"""Budgets: losses that reduce compute, or bound it.

All act on one global ratio, so that the optimiser moves compute between heads and layers. A target is annealed: a
target that holds from the first step drives thresholds to zero before the network has learned which keys matter
(observed: kept 0.000 and chance accuracy). The curve is the cubic one of gradual pruning (arXiv
1710.01878): dense until `start`, at the target from `end` on, both as shares of the training steps.
"""

import torch
from torch import Tensor, nn

from thresher.attention.options import check_flags, check_number
from thresher.budget.meter import Quantity, check_quantity


class Budget(nn.Module):
    """No budget: compute is only measured.

    Attributes:
        quantity: What the budget bounds, "kept" or "macs".
        bound: The ratio to end at or below, or None.
    """

    bound: float | None = None

    def __init__(self, quantity: Quantity = "kept") -> None:
        super().__init__()
        self.quantity: Quantity = check_quantity(quantity)
        self._calibrated = False

    def hold_by_calibration(self) -> None:
        """Record that calibration keeps thresholds at `aim`, so that the budget holds without gradient."""
        self._calibrated = True

    def release(self) -> None:
        """Give up the bound."""
        self.bound = None

    def aim(self, progress: float) -> float | None:
        """Compute the ratio to aim at after a share `progress` of the training steps; None without a target."""
        return None

    def loss(self, ratio: Tensor, progress: float) -> Tensor:
        """Compute the term to add to the task's loss, given the ratio of this step."""
        return ratio.new_zeros(())

    def update(self, ratio: Tensor, progress: float) -> None:
        """Advance the budget's own state after a step."""

    def settle(self, ratio: Tensor, attention: str) -> str:
        """Decide from the ratio of the first step whether the budget can be followed; describe the decision.

        Raises:
            ValueError: Nothing in the network can change the ratio.
        """
        return "no compute budget: compute is measured only"

    def _is_followable(self, ratio: Tensor) -> bool:
        return ratio.requires_grad or self._calibrated

    def _refuse(self, attention: str) -> ValueError:
        return ValueError(
            f"compute.quantity={self.quantity} cannot be trained: nothing in attention={attention} can change its "
            "cost by gradient or calibration. Choose compute=free and set the sparsity by the mechanism's own "
            "hyper-parameters, or a mechanism with thresholds (attention=latte attention.trainable=true)"
        )


class Penalty(Budget):
    """Weight times the ratio, after a dense start.

    With thresholds whose only gradient is this term, the weight hardly matters under Adam.

    Args:
        weight: Weight of the ratio in the loss.
        start: Share of the steps without the penalty.
        quantity: "kept" or "macs".
    """

    def __init__(self, weight: float = 1.0, start: float = 0.1, quantity: Quantity = "kept") -> None:
        super().__init__(quantity)
        check_number("compute.weight", weight, above=0.0)  # compute=free means no penalty
        self.weight = weight
        self.start = _check_share("start", start)

    def loss(self, ratio: Tensor, progress: float) -> Tensor:
        return self.weight * ratio * (progress >= self.start)

    def settle(self, ratio: Tensor, attention: str) -> str:
        if not ratio.requires_grad:
            raise self._refuse(attention)
        return f"compute penalty: {self.weight:g} x {self.quantity}"


class Target(Budget):
    """Weight times the squared distance to an annealed target.

    Two-sided on purpose: a hinge overshoots, and too low a ratio does not recover.

    Args:
        target: Ratio to end at, in (0, 1].
        weight: Weight of the squared distance.
        start: Share of the steps before the target leaves 1.
        end: Share of the steps after which it stays at `target`; as `start`, for one that holds at once.
        quantity: "kept" or "macs".
        margin: Share of the target by which training aims below it, so that an evaluation ends within it.
        required: Whether to refuse a network that cannot follow; otherwise it is trained without budget.
    """

    def __init__(
        self,
        target: float = 0.15,
        weight: float = 10.0,
        start: float = 0.1,
        end: float = 0.6,
        quantity: Quantity = "kept",
        margin: float = 0.04,
        required: bool = True,
    ) -> None:
        super().__init__(quantity)
        check_number("compute.target", target)
        if not 0 < target <= 1:
            raise ValueError(f"compute.target is a share of dense {self.quantity} in (0, 1], got {target}")
        check_number("compute.weight", weight, above=0.0)
        check_number("compute.margin", margin, least=0.0, below=1.0)
        self.bound: float | None = target
        self.weight = weight
        self.start, self.end = _check_share("start", start), _check_share("end", end)
        if end < start:
            raise ValueError(f"compute.end must not come before compute.start, got {end} < {start}")
        check_flags(**{"compute.required": required})
        self.margin = margin
        self.required = required

    def aim(self, progress: float) -> float | None:
        if self.bound is None:
            return None
        way = self.end - self.start
        left = 1 - min(max((progress - self.start) / way, 0.0), 1.0) if way else float(progress < self.end)
        final = self.bound * (1 - self.margin)
        return final + (1 - final) * left**3

    def gap(self, ratio: Tensor, progress: float) -> Tensor:
        aim = self.aim(progress)
        return ratio * 0 if aim is None or progress < self.start else ratio - aim

    def loss(self, ratio: Tensor, progress: float) -> Tensor:
        return self.weight * self.gap(ratio, progress) ** 2

    def settle(self, ratio: Tensor, attention: str) -> str:
        if not self._is_followable(ratio):
            if self.required:
                raise self._refuse(attention)
            self.release()
            return f"no compute budget: nothing in attention={attention} can be trained towards one (compute=auto)"
        return f"compute budget: at most {self.bound:g} of dense {self.quantity}, annealed"


class Lagrangian(Target):
    """A multiplier that moves until the annealed target holds, plus the damping of an augmented Lagrangian.

    The multiplier is signed: once the ratio has fallen below the target it pays for compute instead.

    Args:
        target: Ratio to end at, in (0, 1].
        weight: Weight of the quadratic damping.
        rate: Step of the multiplier for each training step and unit of distance.
        start: Share of the steps before the target leaves 1.
        end: Share of the steps after which it stays at `target`.
        quantity: "kept" or "macs".
        margin: Share of the target by which training aims below it.
    """

    multiplier: Tensor

    def __init__(
        self,
        target: float = 0.15,
        weight: float = 10.0,
        rate: float = 0.1,
        start: float = 0.1,
        end: float = 0.6,
        quantity: Quantity = "kept",
        margin: float = 0.04,
    ) -> None:
        super().__init__(target, weight, start, end, quantity, margin)
        check_number("compute.rate", rate, above=0.0)
        self.rate = rate
        self.register_buffer("multiplier", torch.zeros(()))

    def loss(self, ratio: Tensor, progress: float) -> Tensor:
        return self.multiplier * self.gap(ratio, progress) + super().loss(ratio, progress)

    def update(self, ratio: Tensor, progress: float) -> None:
        self.multiplier += self.rate * self.gap(ratio.detach(), progress)


def _check_share(name: str, value: float) -> float:
    check_number(f"compute.{name}", value)
    if not 0 <= value <= 1:
        raise ValueError(f"compute.{name} is a share of the training steps in [0, 1], got {value}")
    return value
