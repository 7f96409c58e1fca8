"""Top-k: each query keeps the keys with its k largest scores (arXiv 2106.06899).

Keeps      the k keys of a row with the largest scores, or all visible keys if there are fewer. Among equal scores the
           lower index wins, so results do not depend on the backend.
Costs      D MACs for the score of each visible pair and Dv for each kept pair: (1 + kept) / 2 of dense if D = Dv.
           PyTorch multiplies weights and values as dense matrices, chunk by chunk, and saves memory, not time. The
           kernel computes each score once and then touches kept pairs only. Nothing of size n x m outlives its chunk;
           backward keeps k weights and k indices a row.
Trains     nothing of its own. Gradients are those of the softmax over the kept keys, with the selection held constant;
           dropped keys get none. The cost has no gradient, so no budget can train it: you set k. With `per_head` each
           head has a trained factor of k, whose gradient is that of a smooth step over the logarithm of ranks.
Estimates  nothing: outputs are deterministic. With m the dropped softmax mass, the error against dense attention is
           m (mean of dropped values - mean of kept values), each weighted by the softmax.
Patterns   all four; in causal self attention row i chooses among the keys up to i.
Differs    from the official code. That code replays one dropout mask for all chunks, which gives wrong gradients with
           more than one chunk; it cannot combine causality with padding, returns the mean of arbitrary values for rows
           without a key, fails under autocast, and has no score bias. Here backward reads the saved mask.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thresher.attention.backends import Backend
from thresher.attention.contract import Attended, Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import check_flags, check_integer
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import hides_some_pairs, trace_vectors, zero_nonfinite
from thresher.attention.shared.functional import (
    attach_slope,
    drop_weights,
    fill_hidden,
    promote_to_fp32,
    weigh_gated,
)
from thresher.attention.shared.offsets import KeyFactors
from thresher.attention.shared.selection import (
    check_keys,
    count_kept_by_head,
    count_kept_keys,
    find_largest,
    scatter_entries,
    tabulate_kept_keys,
)
from thresher.attention.shared.tail import TailKind, build_tail, count_tail_cost, weigh_with_tail

RANK_WIDTH = 0.3  # of the smooth step that gives factors a gradient, in the logarithm of ranks


class TopK(Mechanism):
    """Softmax attention over the k best keys of each query.

    Args:
        keys: Keys that each query keeps: a whole number, or a share in (0, 1] of the visible ones, at least one.
        tail: "mean" gives dropped keys the weight of their mean score, "none" no weight; see `shared/tail.py`.
        per_head: Whether each head multiplies `keys` by a factor of its own, 1 at first, which `thresher.tune` trains.
        chunk: Queries whose scores PyTorch holds in memory at a time; the kernel ignores it.
        backend: "reference" is PyTorch; "cpu" is the kernel and raises an error where the kernel cannot compute a
            call; "auto" is the kernel where it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    reads_sums = True
    keeps_types = True
    traces_itself = True
    dense_limit = {"keys": 1.0}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        keys: int | float = 0.15,
        tail: TailKind = "mean",
        per_head: bool = False,
        chunk: int = 256,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern, backend)
        check_keys(keys)
        check_integer("chunk", chunk, 1)
        check_flags(per_head=per_head)
        self.keys, self.tail, self.chunk = keys, build_tail(tail, num_heads), chunk
        self.factors = KeyFactors(num_heads) if per_head else None

    def reference(self, x: Prepared) -> Attended:
        if self.tail is not None or self.trains_factors:
            return self.attend_differentiably(x)
        x.trace_scores()
        (of_q, of_k), of_v = x.score_traces, trace_vectors(x.v)
        q, k, v = x.q, x.k, zero_nonfinite(x.v, of_v)
        if hides_some_pairs(x.call, self.pattern, x.n):
            q, k = zero_nonfinite(q, of_q), zero_nonfinite(k, of_k)
        with torch.autocast(x.device.type, enabled=False):
            q, k, bias, outs = promote_to_fp32(q) * x.scale, promote_to_fp32(k), x.call.bias, []
            limit, k_most = self.count_limits(x), self.count_most(x)
            for start in range(0, x.n, self.chunk):
                rows = range(start, min(start + self.chunk, x.n))
                part = slice(rows.start, rows.stop)
                some_bias = None if bias is None else bias[:, :, part]
                few, shown = limit[:, :, part, None], x.visible_rows(rows)
                outs.append(_TopKAttention.apply(q[:, :, part], k, v, of_v, some_bias, shown, few, k_most, x.dropout))
        return self.charge(x, torch.cat(outs, 2))

    def attend_differentiably(self, x: Prepared) -> Attended:
        """Attend with the gradients of tails and of factors, chunk by chunk.

        Backward computes the scores of a chunk once more instead of keeping them.
        """
        x.trace_all()  # a tail reads every visible value, and the gradient of a factor those of dropped keys
        outs, limit, most = [], self.count_limits(x), self.count_most(x)
        offset = self.factors.offset if self.factors is not None and self.trains_factors else None
        with torch.autocast(x.device.type, enabled=False):
            q, k, bias = promote_to_fp32(x.q) * x.scale, promote_to_fp32(x.k), x.call.bias
            factor = None if self.tail is None else self.tail.values()
            for start in range(0, x.n, self.chunk):
                rows = range(start, min(start + self.chunk, x.n))
                part = slice(rows.start, rows.stop)
                some_bias = None if bias is None else bias[:, :, part]
                some = q[:, :, part], k, x.v, some_bias, x.visible_rows(rows), limit[:, :, part, None], factor
                outs.append(checkpoint(_attend_to_chunk, *some, offset, most, x.dropout, use_reentrant=False))
        return self.charge(x, torch.cat(outs, 2))

    def charge(self, x: Prepared, out: Tensor) -> Attended:
        """Return outputs with their cost."""
        kept = self.count_kept(x)
        if self.factors is not None and self.trains_factors:
            kept = attach_slope(kept, kept, self.factors.offset)
        attended = x.attended(out, kept)
        if self.tail is None:
            return attended
        cost = attended.cost
        return attended._replace(cost=cost._replace(select=cost.select + count_tail_cost(x, kept)))

    def count_limits(self, x: Prepared) -> Tensor:
        """Count the keys that each query keeps, [#b, #h, n]."""
        if self.factors is not None:
            return count_kept_by_head(self.keys, self.factors.values(), x.visible_keys)
        return tabulate_kept_keys(self.keys, x.m, x.device)[x.visible_keys]

    def count_most(self, x: Prepared) -> int:
        """Count the keys that a query keeps at most."""
        if self.factors is None:
            return count_kept_keys(self.keys, x.m)
        return x.m if torch.compiler.is_compiling() else max(int(self.count_limits(x).max()), 1)

    @property
    def trains_factors(self) -> bool:
        """Whether the factors of heads receive gradients now."""
        return self.factors is not None and self.factors.offset.requires_grad and torch.is_grad_enabled()

    def count_kept(self, x: Prepared) -> Tensor:
        """Count the kept pairs, [b, h]."""
        return self.count_limits(x).sum(-1).float().expand(x.batch, x.heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keys={self.keys}, chunk={self.chunk}"


def _attend_to_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    limit: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    most: int,
    dropout: float,
) -> Tensor:
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias
    m = k.shape[2]
    index = find_largest(fill_hidden(scores.detach(), visible, float("-inf")), most if offset is None else m)
    kept = (torch.arange(index.shape[-1], device=q.device) < limit).to(scores.dtype).expand(index.shape)
    gate = scatter_entries(kept, index, m)
    if offset is not None:
        slope = _compute_slope(limit, m, scores.dtype).expand(index.shape)
        slope = fill_hidden(scatter_entries(slope, index, m), visible, 0.0)
        gate = attach_slope(gate, slope, offset[:, None, None])
    weights = weigh_gated(scores, gate) if factor is None else weigh_with_tail(scores, gate, visible, factor)
    weights = F.dropout(weights, dropout, dropout > 0)
    return weights.to(v.dtype) @ v


def _compute_slope(limit: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """Compute d gate / d log(number of keys) of the key at each rank, for a smooth step over the logarithm of ranks."""
    rank = torch.arange(m, device=limit.device, dtype=dtype) + 0.5
    soft = ((limit.to(dtype).log() - rank.log()) / RANK_WIDTH).sigmoid()
    return soft * (1 - soft) / RANK_WIDTH


class _TopKAttention(torch.autograd.Function):
    """Attention of a chunk of queries; it saves k entries a row for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of_v: Tensor,
        bias: Tensor | None,
        visible: Tensor | None,
        limit: Tensor,
        most: int,
        dropout: float,
    ) -> Tensor:
        m = k.shape[2]
        scores = q @ k.mT
        if bias is not None:
            scores = scores + bias
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        index = find_largest(scores, most)
        kept = torch.arange(most, device=q.device) < limit
        top = scores.gather(-1, index).masked_fill(~kept, float("-inf"))
        weight = top.masked_fill(limit == 0, 0).softmax(-1).masked_fill(~kept, 0)
        drop = torch.rand_like(weight) >= dropout if dropout else None
        ctx.dropout, ctx.bias_shape = dropout, None if bias is None else bias.shape
        ctx.save_for_backward(q, k, v, weight, index.to(torch.int16 if m <= 2**15 else torch.int32), drop)
        of_kept = of_v[:, :, None].expand(*index.shape[:3], m).gather(-1, index).masked_fill(~kept, 0)
        return scatter_entries(drop_weights(weight, drop, dropout), index, m).to(v.dtype) @ v + of_kept.sum(
            -1, keepdim=True
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight, index, drop = ctx.saved_tensors
        m, index = k.shape[2], index.long()
        for_q, for_k, for_v, _, for_bias = ctx.needs_input_grad[:5]
        used = scatter_entries(drop_weights(weight, drop, ctx.dropout), index, m).to(v.dtype)
        benefit = drop_weights((grad @ v.mT).to(q.dtype).gather(-1, index), drop, ctx.dropout)
        through = scatter_entries(weight * (benefit - (benefit * weight).sum(-1, keepdim=True)), index, m)
        return (
            through @ k if for_q else None,
            through.mT @ q if for_k else None,
            used.mT @ grad if for_v else None,
            None,
            through.sum_to_size(ctx.bias_shape) if for_bias else None,
            None,
            None,
            None,
            None,
        )
