"""What LATTE computes, written out in plain PyTorch for its tests."""

from typing import Any

import torch
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.testing.inputs import Inputs, attend

SELF, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
EXACT = {"estimate": {"bits": "exact"}, "gate": {"into_scores": False}}


def latte(
    pattern: Pattern = SELF,
    *,
    num_heads: int = 2,
    head_dim: int = 8,
    gate: dict[str, Any] | None = None,
    **others: Any,
) -> Latte:
    """Build LATTE by the rule of the paper, with a gradient that reaches every pair, unless it is given others."""
    options = {"unit": "nats", "tail": "none", **others, "gate": {"surrogate": "sigmoid", **(gate or {})}}
    return Latte(num_heads, head_dim, pattern, **options).double()


def scores_of(inputs: Inputs, bias: Tensor | None = None) -> Tensor:
    scores = inputs.q @ inputs.k.transpose(-2, -1) / inputs.q.shape[-1] ** 0.5
    return scores if bias is None else scores + bias


def scales_of(inputs: Inputs, per_token: bool) -> list[Tensor]:
    """The units of the codes: one for each query; one for each example and head of the keys, or for each key."""
    axes = ((inputs.q, -1), (inputs.k, -1 if per_token else (-2, -1)))
    return [x.abs().amax(axis, keepdim=True) / 127 for x, axis in axes]


def estimate_of(inputs: Inputs, bits: int, split: str = "round", per_token: bool = False) -> Tensor:
    """What the top bits of 8-bit codes say about the scores, in Python's and torch's integers."""
    highs, scales = [], scales_of(inputs, per_token)
    for x, scale in zip((inputs.q, inputs.k), scales, strict=True):
        codes, step = (x / scale).round().long(), 2 ** (8 - bits)
        high = (codes / step).round().long() if split == "round" else codes >> (8 - bits)
        highs.append(high.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step)
    product = (highs[0] @ highs[1].transpose(-2, -1)).double()
    return product * scales[0] * scales[1].transpose(-2, -1) / inputs.q.shape[-1] ** 0.5


def difference_of(scores: Tensor, visible: Tensor) -> Tensor:
    best = scores.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    return (best - scores).masked_fill(~visible, torch.inf)


def spread_by_definition(judged: Tensor, visible: Tensor) -> Tensor:
    best = judged.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    return best - torch.where(visible, judged, 0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)


def weights_of(mechanism: Mechanism, inputs: Inputs, call: Call | None = None) -> Tensor:
    """Read the attention weights: with one-hot values the output is the weights."""
    b, h, m, _ = inputs.k.shape
    return attend(mechanism, Inputs(inputs.q, inputs.k, torch.eye(m).double().expand(b, h, m, m)), call).out


def kept_by(mechanism: Mechanism, inputs: Inputs, call: Call | None = None) -> Tensor:
    return weights_of(mechanism, inputs, call) > 0


def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = torch.where(keep, (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total) @ v


def step_of(x: Tensor, tau: float | Tensor, surrogate: str) -> Tensor:
    """The smooth step whose gradient the gate has; those that end rise within 3 tau."""
    if surrogate == "sigmoid":
        return (x / tau).sigmoid()
    if surrogate == "inside":
        t = (x / (3 * tau)).clamp(0, 1)
        return 1.5 * t - 0.5 * t**3
    t = (x / (6 * tau) + 0.5).clamp(0, 1)
    return 3 * t**2 - 2 * t**3


def reference_with_gate(
    inputs: Inputs,
    theta: Tensor,
    tau: float,
    visible: Tensor,
    into_scores: bool,
    bits: int | None = None,
    spread: bool = False,
    surrogate: str = "sigmoid",
) -> Tensor:
    """The straight-through gate for autograd: (m + g - g.detach()) * exp(S - M), normalised; M is a constant."""
    scores = scores_of(inputs)
    judged = scores.detach() if bits is None else estimate_of(inputs, bits).detach()
    best = judged.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    difference = best - judged
    unit = spread_by_definition(judged, visible) if spread else torch.ones(())
    difference = difference / unit
    if into_scores:
        difference = difference - (scores - scores.detach()) / unit.clamp_min(1)
    theta = theta[:, None, None]
    keep = (difference <= theta) & visible
    soft = step_of(theta - difference, tau, surrogate)
    top = scores.detach().masked_fill(~keep, -torch.inf).amax(-1, keepdim=True)
    share = (keep + soft - soft.detach()) * (scores - top).exp() * visible
    return share / share.sum(-1, keepdim=True) @ inputs.v
