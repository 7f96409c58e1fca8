"""Attention maps of any mechanism: the matrix A by which its outputs are sums of its values, out = A V.

Mechanisms return no weights; some never form any. But a mechanism that is linear in its values is known from what it
does to one-hot ones: called again with the queries and keys of a recorded call, and with the identity [m, m] in place
of the values, it returns A itself, exactly, whatever happens inside. That costs one call with m columns of values.

Two kinds need more. Where outputs are scaled row by row by something that depends on the values (YOSO divides each row
by its length), the identity gives A up to a factor for each row, which the recorded output tells. Where values are
sampled anew from what they were projected from (MCA), the map is that of the expectation, and the output differs from
A V by the noise of the values. Every map is checked against the recorded output; what is none of this is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.base import Attended, Call, Mechanism
from thresher.attention.functional import expand_heads

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of A V against the output, as a share of it


class Recorded(NamedTuple):
    """One call of a mechanism."""

    name: str
    mechanism: Mechanism
    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m dv"]
    call: Call
    attended: Attended


class AttentionMap(NamedTuple):
    """The map of one call.

    Attributes:
        weights: A.
        visible: The pairs that padding, causality and masks leave.
        values: V, one for each head.
        error: |A V - out| / |out|: rounding, and with sampled values their noise.
        expected: Whether this is the map of the expectation of a mechanism that samples its values.
        scaled: Whether a factor for each row was taken from the output.
    """

    weights: Float[Tensor, "b h n m"]
    visible: Bool[Tensor, "b h n m"]
    values: Float[Tensor, "b h m dv"]
    error: float
    expected: bool
    scaled: bool


@contextmanager
def recorded_calls(net: nn.Module) -> Iterator[list[Recorded]]:
    """Record every call of a mechanism inside a network; a module that is called twice appears twice.

    Raises:
        ValueError: The network holds no mechanism.
    """
    calls: list[Recorded] = []
    mechanisms = {name: m for name, m in net.named_modules() if isinstance(m, Mechanism)}
    if not mechanisms:
        raise ValueError(f"{type(net).__name__} holds no mechanism whose attention could be shown; sparsify() it first")

    def record(name: str, mechanism: Mechanism, args: tuple[Any, ...], attended: Attended) -> None:
        q, k, v, call = args
        calls.append(Recorded(name, mechanism, q, k, v, call, attended))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in mechanisms.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_map(recorded: Recorded) -> AttentionMap:
    """Recover the map of a recorded call; the mechanism must be in evaluation mode.

    Raises:
        ValueError: Its output is no weighted sum of its values, not even up to a factor for each row.
    """
    name, mechanism, q, k, v, call, attended = recorded
    assert not mechanism.training
    m = k.shape[2]
    one_hot = torch.eye(m, dtype=v.dtype, device=v.device).expand(*v.shape[:2], m, m).contiguous()
    expected = mechanism.stochastic and mechanism.needs_source
    weights = mechanism.expectation(q, k, one_hot, call) if expected else mechanism(q, k, one_hot, call).out
    values, visible = expand_heads(v, q.shape[1]), mechanism.visible(q, k, call)
    # Hidden values may be anything, NaN included.
    values = values.masked_fill(~visible.any(2)[..., None], 0)
    out, summed = attended.out.double(), weights.double() @ values.double()
    error = _relative(summed - out, out)
    tolerance = TOLERANCE.get(v.dtype, 0.05)
    scaled = not expected and error > tolerance
    if scaled:
        factor = (summed * out).sum(-1, keepdim=True) / summed.square().sum(-1, keepdim=True).clamp_min(1e-30)
        error = _relative(factor * summed - out, out)
        weights = (factor * weights.double()).to(weights.dtype)
        if error > tolerance:
            raise ValueError(
                f"{name}: the output of {type(mechanism).__name__} with these hyper-parameters is no weighted sum of "
                f"its values, not even up to a factor for each row (off by {error:.1%}): it has no map to show"
            )
    return AttentionMap(weights, visible, values, error, expected, scaled)


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp_min(1e-30))
