"""Recover the attention weights of any mechanism: the matrix A with out = A V.

Mechanisms return no weights; some never form any. If outputs are linear in values, a second call recovers A: with the
same queries and keys, and the identity [m, m] as values, the output is exactly A. That costs one call with m columns of
values.

Two kinds of mechanisms need more. YOSO divides each row by a length that depends on the values; the identity then gives
A up to a factor for each row, which follows from the output. MCA samples the projection of the values; the weights are
then those of the expectation, and the output differs from A V by the sampling noise. All weights are checked against
the output; any other mechanism raises an error.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thresher.attention.contract import Call
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.functional import expand_heads
from thresher.attention.shared.tail import silence_tails

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of A V against the output, as a share of it


class Weights(NamedTuple):
    """The weights of one call.

    Attributes:
        weights: A.
        visible: Pairs that padding, causality and masks leave visible.
        values: V, one for each head.
        error: |A V - out| / |out|: rounding, plus sampling noise with sampled values.
        expected: Whether the weights are those of the expectation, because the mechanism samples its values.
        scaled: Whether the output determined a factor for each row.
    """

    weights: Float[Tensor, "b h n m"]
    visible: Bool[Tensor, "b h n m"]
    values: Float[Tensor, "b h m dv"]
    error: float
    expected: bool
    scaled: bool


@torch.no_grad()
def recover_weights(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor) -> Weights:
    """Recover the weights of a call from its output; meters do not count the second call.

    Raises:
        ValueError: The output is no weighted sum of the values, not even up to a factor for each row.
    """
    expected = mechanism.stochastic and mechanism.needs_source
    weights = _attend_to_identity(mechanism, q, k, v, call)
    values, visible = expand_heads(v, q.shape[1]), mechanism.visible(q, k, call)
    # Hidden values may hold any value, NaN included.
    values = values.masked_fill(~visible.any(2)[..., None], 0)
    whole, summed = out.double(), weights.double() @ values.double()
    error = _measure_error(summed - whole, whole)
    tolerance = TOLERANCE.get(v.dtype, 0.05)
    scaled = not expected and error > tolerance
    if scaled:
        factor = (summed * whole).sum(-1, keepdim=True) / summed.square().sum(-1, keepdim=True).clamp_min(1e-30)
        error = _measure_error(factor * summed - whole, whole)
        weights = (factor * weights.double()).to(weights.dtype)
        if error > tolerance:
            raise ValueError(
                f"the output of {type(mechanism).__name__} with these hyper-parameters is no weighted sum of its "
                f"values, not even up to a factor for each row (off by {error:.1%}): it has no map to show"
            )
    return Weights(weights, visible, values, error, expected, scaled)


@torch.no_grad()
def find_kept_pairs(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Bool[Tensor, "b h n m"]:
    """Find the pairs that a call keeps: those that have a weight where tails have none."""
    with silence_tails(mechanism):
        return _attend_to_identity(mechanism, q, k, v, call) != 0


def _attend_to_identity(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attend with the identity as values; in expectation, where a mechanism samples its values."""
    if mechanism.stochastic and mechanism.needs_source:
        return mechanism.expectation(q, k, one_hot_like(v), call)
    return mechanism.forward(q, k, one_hot_like(v), call).out


def one_hot_like(v: Float[Tensor, "b hk m dv"]) -> Float[Tensor, "b hk m m"]:
    """Build identity matrices in place of values."""
    m = v.shape[2]
    return torch.eye(m, dtype=v.dtype, device=v.device).expand(*v.shape[:2], m, m).contiguous()


def _measure_error(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp_min(1e-30))
