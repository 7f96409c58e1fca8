"""Top-k: each query keeps the keys with its k largest scores (arXiv 2106.06899).

Keeps      the k keys of a row with the largest scores, all of them if fewer are visible; of equal scores the one with
           the lower index, so that results do not depend on the backend.
Costs      every score is computed, D MACs a visible pair, and Dv for each kept pair: (1 + kept) / 2 of dense if D = Dv.
           PyTorch multiplies weights and values as dense matrices, chunk by chunk: what it saves is memory. The kernel
           computes scores once and touches kept pairs only in all the rest. Nothing of size n x m outlives its chunk;
           backward keeps k weights and k indices a row.
Trains     nothing of its own. Gradients are those of the softmax over the kept keys, the selection held constant;
           nothing flows to dropped keys. The cost has no gradient, so no budget can train it: k is set.
Estimates  nothing: outputs are deterministic. With m the dropped softmax mass, the error against dense attention is
           m (mean of dropped values - mean of kept values), each weighted by the softmax.
Patterns   all four; in causal self attention row i chooses among the keys up to i.
Differs    from the official code, which replays one dropout mask for all chunks (wrong gradients with more than one),
           cannot combine causality with padding, returns the mean of arbitrary values for rows without a key,
           fails under autocast, and has no score bias. Here the kept dropout mask is saved, k entries a row.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.attention.backends import Backend, check_backend, served_by_kernel
from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.dense import attend_densely
from thresher.attention.functional import at_least_fp32, drop_weights, expand_heads
from thresher.attention.options import check_integer
from thresher.attention.visibility import hide_tokens, no_pairs, visible_keys_of, visible_pairs
from thresher.kernels import topk as kernel
from thresher.kernels.calling import readable


class TopK(Mechanism):
    """Softmax attention over the k best keys of each query.

    Args:
        keys: Keys of a query: a whole number, or a share in (0, 1] of the visible ones, rounded down but at least one.
        chunk: Queries whose scores are in memory at a time, in PyTorch; the kernel sees to that itself.
        backend: "reference" is PyTorch; "cpu" the kernel, refused where it cannot compute a call; "auto" the kernel
            wherever it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    dense_limit = {"keys": 1.0}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        keys: int | float = 0.15,
        chunk: int = 256,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern)
        check_keys(keys)
        check_integer("chunk", chunk, 1)
        self.keys = keys
        check_backend(backend, "topk")
        self.chunk = chunk
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        if no_pairs(q, k):
            return attend_densely(q, k, v, call, self.pattern)
        (b, h, n, d), m = q.shape, k.shape[2]
        k, v = expand_heads(k, h), expand_heads(v, h)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        visible = visible_keys_of(call, self.pattern, n, m, q.device)
        limit = allowed(self.keys, m, q.device)[visible]
        kept, pairs = (x.sum(-1).float().expand(b, h) for x in (limit, visible))
        cost = self.cost(kept, pairs, v.shape[-1])
        k_most, dropout, outs = most(self.keys, m), self.dropout if self.training else 0.0, []
        with torch.autocast(q.device.type, enabled=False):
            if served_by_kernel(self.backend, "topk", (q, k, v), self.obstacle(call)):
                folded = (x.flatten(0, 1) for x in readable(q, k, v))
                seen = None if call.keys is None else call.keys[:, None].expand(b, h, m).flatten(0, 1)
                shift = m - n if self.pattern is Pattern.CAUSAL_SELF and n > 1 else None
                limits = limit.expand(b, h, n).flatten(0, 1)
                attended, _, _ = kernel.attend(*folded, d**-0.5, seen, limits, k_most, shift)
                return Attended(attended.unflatten(0, (b, h)).to(v.dtype), cost)
            wide_q, wide_k = at_least_fp32(q) * d**-0.5, at_least_fp32(k)
            biases = [None] * -(-n // self.chunk) if call.bias is None else call.bias.split(self.chunk, 2)
            for start, part, bias in zip(range(0, n, self.chunk), wide_q.split(self.chunk, 2), biases, strict=True):
                rows = range(start, start + part.shape[2])
                shown = visible_pairs(call, self.pattern, n, m, q.device, rows)
                few = limit[:, :, rows.start : rows.stop, None]
                outs.append(_TopKAttention.apply(part, wide_k, v, bias, shown, few, k_most, dropout))
        return Attended(torch.cat(outs, 2), cost)

    def obstacle(self, call: Call) -> str | None:
        """Say why the kernel cannot compute a call."""
        if call.pairs is not None or call.bias is not None:
            return "it has no masks of pairs and no biases"
        if self.dropout and self.training:
            return "it has no dropout of attention weights"
        return None

    def cost(self, kept: Tensor, visible: Tensor, value_dim: int) -> Cost:
        return Cost(
            score=kept * self.head_dim,
            value=kept * value_dim,
            select=(visible - kept) * self.head_dim,
            dense=visible * (self.head_dim + value_dim),
            kept=kept,
            visible=visible,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keys={self.keys}, chunk={self.chunk}"


def check_keys(keys: int | float) -> None:
    """Raise ValueError where `keys` is neither a number of keys nor a share."""
    whole = isinstance(keys, int) and not isinstance(keys, bool) and keys >= 1
    if not whole and not (isinstance(keys, float) and 0 < keys <= 1):
        raise ValueError(f"keys must be a number of keys >= 1 or a share in (0, 1], got {keys!r}")


def most(keys: int | float, m: int) -> int:
    """Return how many of m visible keys a row keeps."""
    return min(keys, m) if isinstance(keys, int) else min(max(math.floor(keys * m + 1e-9), 1), m)


def allowed(keys: int | float, m: int, device: torch.device) -> Int[Tensor, " visible"]:
    """Return how many keys a row keeps of 0, 1, ..., m visible ones."""
    visible = torch.arange(m + 1, dtype=torch.float64)
    wanted = torch.full_like(visible, float(keys)) if isinstance(keys, int) else (visible * keys + 1e-9).floor()
    return wanted.clamp_min(1).minimum(visible).long().to(device, non_blocking=True)


def largest(scores: Float[Tensor, "*rows m"], k: int) -> Int[Tensor, "*rows k"]:
    """Return the indices of the k largest scores in descending order, of equal ones the lower index first.

    nan counts as largest, so that it is not hidden by the selection.
    """
    if scores.dtype == torch.float64 or torch.compiler.is_exporting():  # ONNX cannot read the bits of a float
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # The bits of a float, read as a whole number, are ordered as the floats are, but for the signs of zero and nan.
    bits = (scores + 0.0).masked_fill(scores.isnan(), float("nan")).view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return ((order.long() << 32) | (0xFFFFFFFF - index)).topk(k, dim=-1).indices


class _TopKAttention(torch.autograd.Function):
    """Attention of a chunk of queries that keeps k entries a row for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        index = largest(scores, most)
        kept = torch.arange(most, device=q.device) < limit
        top = scores.gather(-1, index).masked_fill(~kept, float("-inf"))
        weight = top.masked_fill(limit == 0, 0).softmax(-1).masked_fill(~kept, 0)
        drop = torch.rand_like(weight) >= dropout if dropout else None
        ctx.dropout, ctx.bias_shape = dropout, None if bias is None else bias.shape
        ctx.save_for_backward(q, k, v, weight, index.to(torch.int16 if m <= 2**15 else torch.int32), drop)
        return spread(drop_weights(weight, drop, dropout), index, m).to(v.dtype) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight, index, drop = ctx.saved_tensors
        m, index = k.shape[2], index.long()
        for_q, for_k, for_v, for_bias = ctx.needs_input_grad[:4]
        used = spread(drop_weights(weight, drop, ctx.dropout), index, m).to(v.dtype)
        benefit = drop_weights((grad @ v.mT).to(q.dtype).gather(-1, index), drop, ctx.dropout)
        through = spread(weight * (benefit - (benefit * weight).sum(-1, keepdim=True)), index, m)
        return (
            through @ k if for_q else None,
            through.mT @ q if for_k else None,
            used.mT @ grad if for_v else None,
            through.sum_to_size(ctx.bias_shape) if for_bias else None,
            None,
            None,
            None,
            None,
        )


def spread(x: Tensor, index: Tensor, m: int) -> Tensor:
    """Put k entries a row where they belong among m; the indices of a row differ."""
    return x.new_zeros(*x.shape[:-1], m).scatter_(-1, index, x)
