"""The tail: what a row drops still weighs something, and costs no further pass over the pairs.

Sparse attention that renormalises over the kept keys acts as if the dropped ones had no mass. With a tail every dropped
key of a row weighs as if its score were mu, the mean score of all dropped keys, times a trained factor of its head:

    weight_j = exp(S_j) / Z for kept keys,  factor exp(mu) / Z for dropped ones,  Z such that weights sum to 1.

Up to a factor of 1 the tail never has more mass than was dropped: exp(mu) is at most the mean of exp(S_j) (Jensen).
All dropped keys of a row weigh alike, so that sums over the visible keys and values, less those that are kept, say all
there is to say about them. Kernels make these sums, running ones in causal attention, in time and memory linear in the
number of tokens (`kernels/csrc/tail.h`). Where a row drops nothing it has no tail.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.options import check_choice
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import MAX_EXCESS, clamp_from_below, promote_to_fp32

TailKind = Literal["none", "mean"]


class Tail(nn.Module):
    """The trained factor of each head's tail: 1 at first, 0 where a head does without.

    Args:
        num_heads: Number of query heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(num_heads))

    def values(self) -> Float[Tensor, " h"]:
        """Return the factors, at least 0; a factor at 0 still receives the gradient that raises it."""
        return clamp_from_below(self.factor, 0.0)


def build_tail(kind: TailKind, num_heads: int) -> Tail | None:
    """Build the tail of a mechanism; None where `kind` is "none".

    Raises:
        ValueError: There is no such kind.
    """
    check_choice("tail", kind, get_args(TailKind))
    return Tail(num_heads) if kind == "mean" else None


@contextmanager
def silence_tails(module: nn.Module) -> Iterator[None]:
    """Give the tails inside a module a factor of 0 for a while; not between a forward and its backward."""
    factors = [each.factor for each in module.modules() if isinstance(each, Tail)]
    before = [factor.detach().clone() for factor in factors]
    try:
        with torch.no_grad():
            for factor in factors:
                factor.zero_()
        yield
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, before, strict=True):
                factor.copy_(value)


def weigh_with_tail(
    scores: Float[Tensor, "b h n m"],
    gate: Float[Tensor, "b h n m"],
    visible: Bool[Tensor, "#b #h #n m"] | None,
    factor: Float[Tensor, " h"],
) -> Float[Tensor, "b h n m"]:
    """Weigh kept keys by their scores and dropped ones by their mean score, differentiably. The reference.

    Args:
        scores: Scores; anything where hidden.
        gate: 1 for kept keys and 0 for all others, with whatever gradient the selection has; 0 where hidden.
        visible: Which pairs are visible; None is all.
        factor: What the tail of each head is multiplied by.
    """
    if visible is None:
        dropped = 1 - gate
    else:
        scores = scores.masked_fill(~visible, 0)
        dropped = visible.to(gate.dtype) - gate
    count = dropped.sum(-1, keepdim=True)
    some = count.detach() > 0.5
    mean = (scores * dropped).sum(-1, keepdim=True) / torch.where(some, count, 1)
    with torch.no_grad():
        top = scores.masked_fill(gate < 0.5, float("-inf")).amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0)
    share = (scores - top).clamp_max(MAX_EXCESS).exp()
    tail = factor[:, None, None] * (mean - top).clamp_max(MAX_EXCESS).exp().masked_fill(~some, 0)
    weights = gate * share + dropped * tail
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total.detach() > 0, total, 1)


def expand_factor(tail: Tail | None, x: Prepared, dtype: torch.dtype) -> Float[Tensor, " g"] | None:
    """Return the factor of each group of a kernel's call, for every example and head; None without a tail."""
    return None if tail is None else tail.values().to(dtype).expand(x.batch, x.heads).flatten()


def sum_visible_tokens(x: Prepared) -> tuple[Tensor, Tensor]:
    """Sum the keys and the values that each query sees, [b, h, #n, width]; running sums where attention is causal."""
    k, v = promote_to_fp32(x.k), promote_to_fp32(x.v)
    if x.causal_shift is None:
        return k.sum(2, keepdim=True), v.sum(2, keepdim=True)
    return k.cumsum(2)[:, :, x.causal_shift :], v.cumsum(2)[:, :, x.causal_shift :]


def count_tail_cost(x: Prepared, kept: Float[Tensor, "b h"]) -> Float[Tensor, "b h"]:
    """Count the MACs of a tail: each visible token is added to two sums, and each query reads them once.

    A head that keeps all `kept` of its pairs has no tail.
    """
    tokens: Tensor | int = 0
    for number, seen in ((x.n, x.seen_queries), (x.m, x.seen_keys)):
        tokens = tokens + (number if seen is None else seen.sum(-1))
    return (kept.detach() < x.pairs).float() * (tokens * (x.head_dim + x.value_dim))
