"""Softmax attention inside tiles, a few queries and a few keys each, merged over rounds by log-sum-exp."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.attention.functional import drop_weights
from thresher.attention.layout import Layout, from_slots, to_slots


class MergedAttention(torch.autograd.Function):
    """Softmax attention of tiles whose rounds are merged by their log-sum-exp, with the gradient in closed form.

    With lse_r of one round and LSE = log sum_r exp(lse_r), the merged weights are P_r exp(lse_r - LSE), and
    dL/dscore = weight (g.v - g.out): what attention over all rounds at once would give.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Tensor | None,
        shown: Tensor,
        drop: Tensor | None,
        dropout: float,
        queries: Layout,
    ) -> Tensor:
        lowest = torch.finfo(q.dtype).min
        scores = q @ k.mT
        if extra is not None:
            scores += extra
        scores.masked_fill_(~shown, lowest)
        weights = scores.softmax(-1)
        level = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
        level = level.masked_fill(level <= lowest / 2, float("-inf"))
        outs = drop_weights(weights, drop, dropout) @ v
        levels = from_slots(level.flatten(2, 3), queries).masked_fill(_without_slot(queries), float("-inf"))
        merged = levels.logsumexp(0)
        merged = merged.masked_fill(merged == float("-inf"), float("inf"))
        out = (from_slots(outs.flatten(2, 3), queries) * (levels - merged).exp()).sum(0)
        share = to_slots(merged, queries).masked_fill((queries.token == merged.shape[1])[..., None], float("inf"))
        share = share.view_as(level)
        weights *= (level - share).exp_()
        ctx.dropout = dropout
        ctx.save_for_backward(q, k, v, weights, drop, out, *queries)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, drop, out, *layout = ctx.saved_tensors
        queries = Layout(*layout)
        shape = q.shape[:-1]
        g = to_slots(grad, queries).view(*shape, -1)
        mean = to_slots((grad * out).sum(-1, keepdim=True), queries).view(*shape, 1)
        through = drop_weights(g @ v.mT, drop, ctx.dropout).sub_(mean).mul_(weights)
        extra = through if ctx.needs_input_grad[3] else None
        return (
            through @ k,
            through.mT @ q,
            drop_weights(weights, drop, ctx.dropout).mT @ g,
            extra,
            None,
            None,
            None,
            None,
        )


def _without_slot(layout: Layout) -> Tensor:
    return (layout.slot == layout.token.shape[-1])[..., None]
