"""Arithmetic that mechanisms share: masked softmax, unit vectors, straight-through, gradients known in closed form."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

MAX_EXCESS = 30.0
LEAST_LENGTH = 1e-12  # of a vector; a shorter one is not made a unit vector


def expand_heads(x: Shaped[Tensor, "b hk m d"], num_heads: int) -> Shaped[Tensor, "b h m d"]:
    """Repeat grouped key/value heads until there is one for each query head.

    Raises:
        ValueError: The number of query heads is not a multiple of the number of key heads.
    """
    groups = x.shape[1]
    if groups == num_heads:
        return x
    if num_heads % groups:
        raise ValueError(f"{num_heads} query heads cannot share {groups} key/value heads evenly")
    return x.repeat_interleave(num_heads // groups, dim=1)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is when it already has that precision or more."""
    return x if x.dtype == torch.float64 else x.float()


def fill_hidden(x: Tensor, visible: Tensor | None, value: float) -> Tensor:
    """Put `value` where nothing is visible."""
    return x if visible is None else x.masked_fill(~visible, value)


def masked_softmax(
    scores: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None
) -> Float[Tensor, "b h n m"]:
    """Softmax over the visible keys; a row that sees none has weight and gradient zero."""
    if visible is None:
        return scores.softmax(-1)
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0)
    return scores.softmax(-1).masked_fill(~visible, 0)


def drop_weights(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Apply a dropout mask, rescaled so that the mean stays; None drops nothing."""
    return x if keep is None else x * keep / max(1 - p, torch.finfo(x.dtype).tiny)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, variable: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.shape = variable.shape
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, (grads[0] * slope).sum_to_size(ctx.shape)


def with_slope(value: Tensor, slope: Tensor, variable: Tensor) -> Tensor:
    """Return `value`, with d value / d variable = slope: a surrogate gradient known in closed form.

    Unlike `value + slope * (variable - variable.detach())` it is right where `variable` is infinite.
    """
    return _WithSlope.apply(value, slope, variable)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low = low
        return x.clamp_min(low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0].masked_fill((x < ctx.low) & (grads[0] > 0), 0), None


def bounded_below(x: Tensor, low: float) -> Tensor:
    """Clamp from below, but let gradients pass that would bring `x` back above the bound.

    Under a plain clamp a parameter that has crossed the bound never receives a gradient again.
    """
    return _Bounded.apply(x, low)


class _GatedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        theta: Tensor,
        keep: Tensor,
        slope: Tensor,
        into_scores: bool,
        unit: Tensor | None,
    ) -> Tensor:
        best = scores.masked_fill(~keep, float("-inf")).amax(-1, keepdim=True)
        best = best.masked_fill(best == float("-inf"), 0)
        share = (scores - best).clamp_max_(MAX_EXCESS).exp_()
        weights = share * keep
        total = weights.sum(-1, keepdim=True)
        total = total.masked_fill(total == 0, 1)
        ctx.save_for_backward(share.div_(total), keep, slope, unit)
        ctx.into_scores, ctx.theta_shape = into_scores, theta.shape
        return weights.div_(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        share, keep, slope, unit = ctx.saved_tensors
        weights = share * keep
        benefit = grads[0] - (grads[0] * weights).sum(-1, keepdim=True)
        through_gate = (share * slope).mul_(benefit)
        through_scores = weights.mul_(benefit)
        if ctx.into_scores:
            through_scores = through_scores.add_(through_gate if unit is None else through_gate / unit)
        return through_scores, through_gate.sum_to_size(ctx.theta_shape), None, None, None, None


def gated_softmax(
    scores: Float[Tensor, "b h n m"],
    theta: Float[Tensor, "h 1 1"],
    keep: Bool[Tensor, "b h n m"],
    slope: Float[Tensor, "b h n m"],
    into_scores: bool,
    unit: Float[Tensor, "b h n 1"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """Softmax over the kept keys, in which a threshold receives the gradient of its gate.

    With e = exp(score), Z the sum of e over kept keys and P the result, dL/dgate = (e / Z) (dL/dP - sum P dL/dP),
    for kept and dropped keys alike, and dL/dtheta = sum dL/dgate * slope: what autograd would find for
    gate * e / sum(gate * e) with a straight-through gate, in a third of the passes over memory. Scores receive the
    gradient of the masked softmax and, if `into_scores`, that of the gate besides, the row's best held constant;
    `unit` divides the gate's gradient to scores, where differences were measured in units of their row.

    A dropped key can outweigh the kept ones, if an estimate misjudged it; its excess counts up to 30 nats.
    """
    return _GatedSoftmax.apply(scores, theta, keep, slope, into_scores, unit)


def unit_vectors(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Divide vectors by their lengths; zero stays zero."""
    return F.normalize(x, dim=-1, eps=LEAST_LENGTH)


def gradient_to_vectors(
    x: Float[Tensor, "*batch d"], unit: Float[Tensor, "*batch d"], grad: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """Return the gradient to vectors from that to their unit vectors."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (unit * grad).sum(-1, keepdim=True).masked_fill(length < LEAST_LENGTH, 0)
    return (grad - unit * along) / length.clamp_min(LEAST_LENGTH)
