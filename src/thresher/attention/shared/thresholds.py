"""One trainable threshold for each head, and its gate.

The difference of a key is how far its score lies below the row's best. A key is kept iff this is at most theta:

    keep_ij  <=>  max_j S_ij - S_ij <= theta_h,  theta_h = max(0, base_h + offset_h)

The difference of the best key is 0, so every row with a visible key keeps one. `base` is calibrated and may follow an
annealed budget (`thresher.budget.calibration`); `offset` is trained. Starting from a quantile of its own differences,
each head can move in both directions; a threshold trained from scratch tends to fall to zero and stay there.
Evaluation uses `eval_base` instead of `base`: without dropout scores spread differently, and the theta that keeps 15 %
of the pairs of a training step may keep 33 % of the same pairs in evaluation.

The surrogate gradient replaces the step function by a smooth step g. With x = theta - difference,

    sigmoid   g = sigmoid(x / tau)                            g' = g (1 - g) / tau
    compact   g = 1/2 + 3/4 u - 1/4 u^3,  u = x / (3 tau)     g' = 3/4 (1 - u^2) / (3 tau)  for |u| < 1, else 0
    inside    g = 3/2 u - 1/2 u^3,        u = x / (3 tau)     g' = 3/2 (1 - u^2) / (3 tau)  for 0 <= u < 1, else 0

The slope of the compact step is a parabola. The step rises from 0 to 1 and is as steep at theta as the sigmoid: with
half-width w, g'(0) = 3 / (4 w) = 1 / (4 tau) gives w = 3 tau. A pair further from theta has exactly zero gradient, so
the kernel skips it. The inside step is the half on the kept side, twice as steep, so it also rises from 0 to 1. Dropped
pairs then have no gradient and cost nothing; a dropped key comes back only through its row's threshold, not its score.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.contract import Call, Pattern
from thresher.attention.options import check_choice, check_number
from thresher.attention.shared.functional import attach_slope, clamp_from_below, fill_hidden
from thresher.attention.shared.offsets import HeadOffsets, named_offsets

Surrogate = Literal["sigmoid", "compact", "inside"]
Unit = Literal["nats", "spread"]
UNITS: tuple[Unit, ...] = get_args(Unit)
IN_SPREADS = "in_spreads"  # the buffer that says the unit, in files too


class Differences(NamedTuple):
    """The differences that thresholds are compared with.

    Attributes:
        difference: How far each score lies below its row's best, in the unit of the threshold; arbitrary where hidden.
        visible: Visible pairs; None means all.
        always_keep: Number of leading keys that are kept at any difference.
    """

    difference: Float[Tensor, "b h n m"]
    visible: Bool[Tensor, "#b #h #n m"] | None
    always_keep: int


@runtime_checkable
class Thresholded(Protocol):
    """A mechanism with thresholds that can measure differences for calibration."""

    thresholds: "Thresholds"
    pattern: Pattern

    @property
    def rows_together(self) -> int:
        """The number of consecutive queries that choose keys together."""

    def measure_differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        """Measure the differences of all pairs of a call."""


class Gate(NamedTuple):
    """The decisions of thresholds.

    Attributes:
        keep: Kept pairs.
        slope: g', the surrogate's d keep / d threshold; None without gradient.
        kept: Number of kept pairs, with the surrogate gradient to the threshold.
        threshold: Thresholds, differentiable with respect to `offset`.
    """

    keep: Bool[Tensor, "b h n m"]
    slope: Float[Tensor, "b h n m"] | None
    kept: Float[Tensor, "b h"]
    threshold: Float[Tensor, "h 1 1"]


class Thresholds(HeadOffsets):
    """Head-wise thresholds on score differences.

    Args:
        num_heads: Number of thresholds.
        initial: Initial base, at least 0; infinity keeps all pairs.
        tau: Width of the surrogate, in the same unit.
        trainable: Whether `offset` receives gradients.
        unit: Unit of differences: "nats", or the "spread" of their row. It is part of the state: `in_spreads` stores
            it, and code reads `unit`, which waits for no device.
        surrogate: Step that gives the gate its slope: "sigmoid", "compact" or "inside".

    Attributes:
        decides: Whether these thresholds decide what is kept. A mechanism that keeps a number of keys instead sets this
            to False, and nothing calibrates or reports them.

    Raises:
        ValueError: `initial` is negative or not a number, `tau` is not positive, or there is no such unit.
    """

    base: Tensor
    eval_base: Tensor
    tau: Tensor
    in_spreads: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        initial: float,
        tau: float,
        trainable: bool,
        unit: str = "nats",
        surrogate: Surrogate = "sigmoid",
    ) -> None:
        check_choice("unit", unit, UNITS)
        super().__init__(num_heads, trainable, unit)
        if initial != math.inf:  # infinity keeps all pairs; below 0 even the best key would be dropped
            check_number("threshold", initial, least=0.0)
        check_number("tau", tau, above=0.0)
        self.register_buffer("base", torch.full((num_heads,), float(initial)))
        self.register_buffer("eval_base", self.base.clone())
        self.register_buffer("tau", torch.tensor(float(tau)))
        self.register_buffer(IN_SPREADS, torch.tensor(unit == "spread"))
        self.surrogate, self.decides = surrogate, True

    def values(self) -> Float[Tensor, " h"]:
        """Return the thresholds of the current mode, differentiable with respect to `offset`."""
        return clamp_from_below((self.base if self.training else self.eval_base) + self.offset, 0.0)

    @torch.no_grad()
    def set_base(self, base: Float[Tensor, " h"] | float) -> None:
        """Set the base of training and of evaluation; heads whose value is NaN keep theirs."""
        for own in (self.base, self.eval_base):
            new = torch.as_tensor(base).to(own).expand_as(own)
            own.copy_(torch.where(new.isnan(), own, new))

    @torch.no_grad()
    def set_unit(self, unit: str, tau: float) -> None:
        """Count in another unit, with a surrogate of another width; calibrate then, as old values mean nothing in it.

        Raises:
            ValueError: There is no such unit, or `tau` is not positive.
        """
        check_choice("unit", unit, UNITS)
        check_number("tau", tau, above=0.0)
        self.unit = unit
        self.in_spreads.fill_(unit == "spread")
        self.tau.fill_(tau)

    def read_unit(self) -> None:
        """Read the unit from `in_spreads`, where that was loaded by other means than `load_state_dict`."""
        if not self.in_spreads.is_meta:
            self.in_spreads = self.in_spreads.bool()
            self.unit = "spread" if self.in_spreads.item() else "nats"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.read_unit()

    def forward(
        self,
        difference: Float[Tensor, "b h n m"],
        visible: Bool[Tensor, "#b #h #n m"] | None,
        always_keep: int = 0,
        surrogate: bool = True,
    ) -> Gate:
        """Gate every pair; the first `always_keep` keys are always kept. `difference` is arbitrary where hidden."""
        threshold = self.values()[:, None, None]
        difference = difference.detach()
        keep = difference <= threshold
        if always_keep:
            keep[..., :always_keep] = True
        if visible is not None:
            keep = keep & visible
        kept = keep.sum((-2, -1)).to(difference.dtype)
        if not (surrogate and torch.is_grad_enabled()):
            return Gate(keep, None, kept, threshold)
        with torch.no_grad():
            slope = self.compute_slope(difference, visible, always_keep)
        return Gate(keep, slope, attach_slope(kept, slope.sum((-2, -1)), self.values()), threshold)

    def compute_slope(
        self, difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, always_keep: int = 0
    ) -> Float[Tensor, "b h n m"]:
        """Compute the surrogate's d keep / d threshold of every pair; 0 where hidden or always kept."""
        margin = self.compute_margin(difference, visible, always_keep)
        if self.surrogate == "inside":
            margin.masked_fill_(margin < 0, float("inf"))
        if self.surrogate != "sigmoid":
            steepest = 4 * self.tau if self.surrogate == "compact" else 2 * self.tau
            return margin.div_(3).square_().clamp_max_(1).neg_().add_(1).div_(steepest)
        soft = margin.sigmoid_()
        return torch.addcmul(soft, soft, soft, value=-1).div_(self.tau)

    def compute_margin(
        self, difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, always_keep: int = 0
    ) -> Float[Tensor, "b h n m"]:
        """Compute (threshold - difference) / tau, differentiable; -inf where hidden and inf where always kept."""
        margin = fill_hidden((self.values()[:, None, None] - difference) / self.tau, visible, float("-inf"))
        if always_keep:
            first = torch.arange(margin.shape[-1], device=margin.device) < always_keep
            first = first if visible is None else first & visible
            margin = margin.masked_fill(first, float("inf"))
        return margin

    def transfer_length(self, old: int, new: int) -> None:
        """Adjust thresholds to another number of keys: theta(new) = theta(old) + ln(new / old).

        This keeps the bound of the dropped mass, which grows with the number of dropped keys times exp(-theta).

        Raises:
            ValueError: A length is below 1, or thresholds are not in nats.
        """
        if self.unit != "nats":
            raise ValueError(f"transfer_length is for thresholds in nats; these count the {self.unit} of their row")
        if old < 1 or new < 1:
            raise ValueError(f"lengths must be at least 1, got {old} and {new}")
        self.base += math.log(new / old)
        self.eval_base += math.log(new / old)

    def extra_repr(self) -> str:
        return f"heads={len(self.base)}, trainable={self.offset.requires_grad}"


def named_thresholds(model: nn.Module) -> Iterator[tuple[str, Thresholds]]:
    """Iterate over mechanisms with thresholds that decide: dotted name and thresholds."""
    for name, offsets in named_offsets(model):
        if isinstance(offsets, Thresholds) and offsets.decides:
            yield name, offsets
