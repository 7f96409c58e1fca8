"""One trainable threshold for each head, and the gate that it opens.

A key of a row is kept iff its difference, how far its score lies below the row's best, is at most theta:

    keep_ij  <=>  max_j S_ij - S_ij <= theta_h,  theta_h = max(0, base_h + offset_h)

The difference of the best key is 0, so no row with a visible key is ever emptied. `base` is calibrated, and may
follow an annealed budget (`thresher.calibration`); `offset` is trained. Started from its own quantile each
head can be moved in either direction, where a threshold trained from scratch tends to run to zero and stay there.
In evaluation `eval_base` takes the place of `base`: without dropout scores spread otherwise, and the theta that keeps
15 % of the pairs of a training step may keep 33 % of the same pairs in evaluation.

The surrogate gradient is that of a smooth step g in place of the step function. With x = theta - difference,

    sigmoid   g = sigmoid(x / tau)                            g' = g (1 - g) / tau
    compact   g = 1/2 + 3/4 u - 1/4 u^3,  u = x / (3 tau)     g' = 3/4 (1 - u^2) / (3 tau)  for |u| < 1, else 0
    inside    g = 3/2 u - 1/2 u^3,        u = x / (3 tau)     g' = 3/2 (1 - u^2) / (3 tau)  for 0 <= u < 1, else 0

Of all steps whose slope is a parabola the compact one is that which rises from 0 to 1 and is as steep at theta as the
sigmoid: with half-width w, g'(0) = 3 / (4 w) = 1 / (4 tau) gives w = 3 tau. A pair further from theta than that has
no gradient at all, exactly, and need not be looked at. The inside step is its half on the kept side, twice as steep, so
that it, too, rises from 0 to 1: dropped pairs have no gradient, which costs nothing beyond the kept ones, and none of
them can come back by its own score, but only with its row's threshold.
"""

import math
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.base import Call, Pattern
from thresher.attention.functional import bounded_below, fill_hidden, with_slope
from thresher.attention.options import check_number

Surrogate = Literal["sigmoid", "compact", "inside"]


class Differences(NamedTuple):
    """What a threshold decides by.

    Attributes:
        difference: How far each score lies below its row's best, in the unit of the threshold; anything where hidden.
        visible: The pairs that count.
        always_keep: Number of leading keys that are kept however far below they lie.
    """

    difference: Float[Tensor, "b h n m"]
    visible: Bool[Tensor, "#b #h #n m"] | None
    always_keep: int


@runtime_checkable
class Thresholded(Protocol):
    """A mechanism with thresholds, which calibration can ask for the differences that they judge."""

    thresholds: "Thresholds"
    pattern: Pattern

    def differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        """Return the differences of all pairs of a call."""


class Gate(NamedTuple):
    """What a threshold decided.

    Attributes:
        keep: The pairs kept.
        slope: g', the surrogate's d keep / d theta; None when no gradient is wanted.
        kept: The number of pairs kept, with the surrogate gradient towards theta.
        theta: The thresholds, differentiable towards `offset`.
    """

    keep: Bool[Tensor, "b h n m"]
    slope: Float[Tensor, "b h n m"] | None
    kept: Float[Tensor, "b h"]
    theta: Float[Tensor, "h 1 1"]


class Thresholds(nn.Module):
    """Head-wise thresholds on score differences.

    Args:
        num_heads: Number of thresholds.
        init: Initial base, at least 0; infinity keeps everything.
        tau: Width of the surrogate, in the same unit.
        trainable: Whether `offset` receives gradients.
        unit: What differences are measured in: "nats", or the "spread" of their row.
        surrogate: Whose slope the gate has, "sigmoid", "compact" or "inside".

    Raises:
        ValueError: `init` is negative or not a number, or `tau` is not positive.
    """

    base: Tensor
    eval_base: Tensor
    tau: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        init: float,
        tau: float,
        trainable: bool,
        unit: str = "nats",
        surrogate: Surrogate = "sigmoid",
    ) -> None:
        super().__init__()
        if init != math.inf:  # which keeps everything; below 0 even the best key would be dropped
            check_number("theta", init, least=0.0)
        check_number("tau", tau, above=0.0)
        self.register_buffer("base", torch.full((num_heads,), float(init)))
        self.register_buffer("eval_base", self.base.clone())
        self.register_buffer("tau", torch.tensor(float(tau)))
        self.offset = nn.Parameter(torch.zeros(num_heads), requires_grad=trainable)
        self.unit = unit
        self.surrogate = surrogate

    def values(self) -> Float[Tensor, " h"]:
        """Return theta, that of training or that of evaluation, differentiable towards `offset`."""
        return bounded_below((self.base if self.training else self.eval_base) + self.offset, 0.0)

    @torch.no_grad()
    def set_base(self, base: Float[Tensor, " h"] | float) -> None:
        """Set the base of training and of evaluation; heads whose value is nan keep theirs."""
        for own in (self.base, self.eval_base):
            new = torch.as_tensor(base).to(own).expand_as(own)
            own.copy_(torch.where(new.isnan(), own, new))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}base" in state_dict:  # earlier files have one base
            state_dict.setdefault(f"{prefix}eval_base", state_dict[f"{prefix}base"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        difference: Float[Tensor, "b h n m"],
        visible: Bool[Tensor, "#b #h #n m"] | None,
        always_keep: int = 0,
        surrogate: bool = True,
    ) -> Gate:
        """Gate every pair; the first `always_keep` keys stay open. `difference` may be anything where hidden."""
        theta = self.values()[:, None, None]
        difference = difference.detach()
        keep = difference <= theta
        if always_keep:
            keep[..., :always_keep] = True
        if visible is not None:
            keep = keep & visible
        kept = keep.sum((-2, -1)).to(difference.dtype)
        if not (surrogate and torch.is_grad_enabled()):
            return Gate(keep, None, kept, theta)
        with torch.no_grad():
            slope = self.slope(difference, visible, always_keep)
        return Gate(keep, slope, with_slope(kept, slope.sum((-2, -1)), self.values()), theta)

    def slope(
        self, difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, always_keep: int = 0
    ) -> Float[Tensor, "b h n m"]:
        """Return the surrogate's d keep / d theta of every pair; 0 where hidden or always kept."""
        margin = self.margin(difference, visible, always_keep)
        if self.surrogate == "inside":
            margin.masked_fill_(margin < 0, float("inf"))
        if self.surrogate != "sigmoid":
            steepest = 4 * self.tau if self.surrogate == "compact" else 2 * self.tau
            return margin.div_(3).square_().clamp_max_(1).neg_().add_(1).div_(steepest)
        soft = margin.sigmoid_()
        return torch.addcmul(soft, soft, soft, value=-1).div_(self.tau)

    def margin(
        self, difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, always_keep: int = 0
    ) -> Float[Tensor, "b h n m"]:
        """Return (theta - difference) / tau, differentiable; -inf where hidden and inf where always kept."""
        margin = fill_hidden((self.values()[:, None, None] - difference) / self.tau, visible, float("-inf"))
        if always_keep:
            first = torch.arange(margin.shape[-1], device=margin.device) < always_keep
            first = first if visible is None else first & visible
            margin = margin.masked_fill(first, float("inf"))
        return margin

    def transfer_length(self, old: int, new: int) -> None:
        """Scale for another number of keys: theta(new) = theta(old) + ln(new / old).

        Holds the error bound of the dropped mass, which grows with the number of dropped keys times exp(-theta).

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
