"""Shared arithmetic: masked softmax, unit vectors, straight-through estimators, gradients in closed form."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

MAX_EXCESS = 30.0
LEAST_LENGTH = 1e-12  # shorter vectors are not scaled to unit length


def expand_heads(x: Shaped[Tensor, "b hk m d"], num_heads: int) -> Shaped[Tensor, "b h m d"]:
    """Repeat grouped key/value heads, one for each query head.

    Raises:
        ValueError: The number of query heads is not a multiple of the number of key heads.
    """
    groups = x.shape[1]
    if groups == num_heads:
        return x
    if num_heads % groups:
        raise ValueError(f"{num_heads} query heads cannot share {groups} key/value heads evenly")
    return x.repeat_interleave(num_heads // groups, dim=1)


def promote_to_fp32(x: Tensor) -> Tensor:
    """Promote `x` to fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def fill_hidden(x: Tensor, visible: Tensor | None, value: float) -> Tensor:
    """Fill hidden entries with `value`."""
    return x if visible is None else x.masked_fill(~visible, value)


def masked_softmax(
    scores: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None
) -> Float[Tensor, "b h n m"]:
    """Compute the softmax over visible keys; a row that sees none has zero weights and zero gradient."""
    if visible is None:
        return scores.softmax(-1)
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0)
    return scores.softmax(-1).masked_fill(~visible, 0)


def weigh_gated(scores: Float[Tensor, "b h n m"], gate: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
    """Compute the softmax over the keys whose gate is 1, with the gradient of the gate, to dropped keys too.

    `gated_softmax` does the same for gates of thresholds on a row's own scores, in fewer passes over memory.
    """
    with torch.no_grad():
        top = scores.masked_fill(gate == 0, float("-inf")).amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0)
    share = gate * (scores - top).clamp_max(MAX_EXCESS).exp()
    total = share.sum(-1, keepdim=True)
    return share / torch.where(total.detach() > 0, total, 1)


def drop_weights(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Apply a dropout mask and rescale to keep the mean; None drops nothing."""
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


def attach_slope(value: Tensor, slope: Tensor, variable: Tensor) -> Tensor:
    """Return `value` with the surrogate gradient d value / d variable = slope.

    Unlike `value + slope * (variable - variable.detach())`, this also works where `variable` is infinite.
    """
    return _WithSlope.apply(value, slope, variable)


class _ClampFromBelow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low = low
        return x.clamp_min(low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0].masked_fill((x < ctx.low) & (grads[0] > 0), 0), None


def clamp_from_below(x: Tensor, low: float) -> Tensor:
    """Clamp from below, but pass gradients that move `x` back above the bound.

    With a plain clamp, a parameter below the bound never receives a gradient again.
    """
    return _ClampFromBelow.apply(x, low)


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
    """Compute the softmax over kept keys and pass the gradient of the gate to its threshold.

    With e = exp(score), Z the sum of e over kept keys and P the result, dL/dgate = (e / Z) (dL/dP - sum P dL/dP) for
    kept and dropped keys, and dL/dtheta = sum dL/dgate * slope. Autograd finds the same for gate * e / sum(gate * e)
    with a straight-through gate, but needs three times as many passes over memory. Scores receive the gradient of the
    masked softmax and, if `into_scores`, that of the gate too, with the row's best held constant. `unit` divides the
    latter where differences are in units of their row.

    If an estimate is wrong, a dropped key can outweigh the kept ones; its excess is clamped to 30 nats.
    """
    return _GatedSoftmax.apply(scores, theta, keep, slope, into_scores, unit)


def normalize_vectors(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Scale vectors to unit length; zero stays zero."""
    return F.normalize(x, dim=-1, eps=LEAST_LENGTH)


def normalize_vectors_backward(
    x: Float[Tensor, "*batch d"], unit: Float[Tensor, "*batch d"], grad: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """Compute the gradient to vectors from the gradient to their unit vectors."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (unit * grad).sum(-1, keepdim=True).masked_fill(length < LEAST_LENGTH, 0)
    return (grad - unit * along) / length.clamp_min(LEAST_LENGTH)
