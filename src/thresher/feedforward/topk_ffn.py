"""Top-k feed-forward: each token keeps the k hidden units with the largest pre-activations (arXiv 2106.06899).

A feed-forward layer is attention of tokens over its hidden units: act(x W_in^T + b_in) W_out^T + b_out has the rows of
W_in as keys, the columns of W_out as values, and the activation in place of the softmax.

Keeps      the k units of a token with the largest pre-activations; among equal ones the lower index wins. Gated layers,
           act(x G^T) (x U^T), keep the units with the largest absolute product; this extends the paper.
Costs      D MACs for each pre-activation (2 D if gated) and the width of the output for each kept unit, as in inference
           that gathers rows of W_out. This file multiplies dense matrices, chunk by chunk, and saves memory, not time.
           Backward keeps k activations and k indices a token. The layer does not know padding and counts padded tokens.
Trains     nothing of its own; gradients are those of the kept units, with the selection held constant.
Estimates  nothing. With ReLU the output is exact wherever at most k pre-activations are positive. GELU and SiLU are not
           monotone below zero; units are still ranked by pre-activation, as in the paper.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.attention.contract import Attended, Cost
from thresher.attention.mechanism import Metered
from thresher.attention.options import check_integer
from thresher.attention.shared.functional import drop_weights, promote_to_fp32
from thresher.attention.shared.selection import check_keys, count_kept_keys, find_largest, scatter_entries

Activation = Callable[[Tensor], Tensor]


class Projection(NamedTuple):
    """A linear map, x @ weight.T + bias."""

    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, " o"] | None


class TopKFeedForward(Metered):
    """A feed-forward layer in which each token uses k hidden units.

    Args:
        keys: Hidden units that each token keeps: a whole number, or a share in (0, 1] of all, at least one.
        chunk: Tokens whose pre-activations are in memory at a time.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    num_heads = 1

    def __init__(self, *, keys: int | float = 0.15, chunk: int = 4096) -> None:
        super().__init__()
        check_keys(keys)
        check_integer("chunk", chunk, 1)
        self.keys, self.chunk, self.dropout = keys, chunk, 0.0

    def forward(
        self,
        x: Float[Tensor, "*batch d"],
        inner: Sequence[Projection],
        outer: Projection | None,
        activation: Activation,
    ) -> Attended:
        """Apply the layer to tokens.

        Args:
            x: Tokens; the first of several batch dimensions is the batch dimension of the cost.
            inner: One projection, or two: the activation of the first gates the second.
            outer: Projection of the hidden units; None returns the hidden units, zero where dropped.
            activation: Elementwise function.
        """
        width = len(inner[0].weight)
        k = count_kept_keys(self.keys, width)
        dropout = self.dropout if self.training else 0.0
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, inner = x.to(dtype), [_cast(each, dtype) for each in inner]
            outer = None if outer is None else _cast(outer, dtype)
        flat = [each for projection in inner for each in projection]
        weight = None if outer is None else outer.weight
        with torch.autocast(x.device.type, enabled=False):
            outs = [
                _TopKUnits.apply(part, k, activation, dropout, weight, *flat)
                for part in x.reshape(-1, x.shape[-1]).split(self.chunk)
            ]
            out = torch.cat(outs).unflatten(0, x.shape[:-1])
            if outer is not None and outer.bias is not None:
                out = out + outer.bias
        return Attended(out, self.count_cost(x, len(inner), width, k, x.shape[-1] if outer is None else out.shape[-1]))

    def count_cost(self, x: Tensor, projections: int, width: int, k: int, value_dim: int) -> Cost:
        """Count the cost; without an outer projection, the output has the width of the input."""
        batch = x.shape[0] if x.ndim > 2 else 1
        tokens = x.shape[:-1].numel() // max(batch, 1)
        score_dim = projections * x.shape[-1]
        pairs = torch.full((batch, 1), float(tokens * width), device=x.device)
        kept = torch.full_like(pairs, float(tokens * k))
        return Cost(
            score=kept * score_dim,
            value=kept * value_dim,
            select=(pairs - kept) * score_dim,
            dense=pairs * (score_dim + value_dim),
            kept=kept,
            visible=pairs,
        )

    def extra_repr(self) -> str:
        return f"keys={self.keys}, chunk={self.chunk}"


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    weight, bias = projection
    return Projection(weight.to(dtype), None if bias is None else bias.to(dtype))


def _activate(activation: Activation, *inner: Tensor) -> Tensor:
    return activation(inner[0]) if len(inner) == 1 else activation(inner[0]) * inner[1]


class _TopKUnits(torch.autograd.Function):
    """The layer on a chunk of tokens; it saves k entries a token for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: int,
        activation: Activation,
        dropout: float,
        outer: Tensor | None,
        *inner: Tensor | None,
    ) -> Tensor:
        weights, biases = inner[::2], inner[1::2]
        pre = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]  # type: ignore[arg-type]
        width = pre[0].shape[-1]
        rank = pre[0] if len(pre) == 1 else _activate(activation, *pre).abs()
        index = find_largest(promote_to_fp32(rank), k)
        top = [each.gather(-1, index) for each in pre]
        drop = torch.rand_like(top[0]) >= dropout if dropout else None
        units = scatter_entries(drop_weights(_activate(activation, *top), drop, dropout), index, width)
        ctx.activation, ctx.dropout, ctx.width = activation, dropout, width
        ctx.save_for_backward(x, index.to(torch.int16 if width <= 2**15 else torch.int32), drop, outer, *weights, *top)
        return units if outer is None else units @ outer.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index, drop, outer, *saved = ctx.saved_tensors
        weights, top = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        index = index.long()
        with torch.enable_grad():
            top = [each.detach().requires_grad_() for each in top]
            hidden = _activate(ctx.activation, *top)
        kept = (grad if outer is None else grad @ outer).gather(-1, index)
        through = torch.autograd.grad(hidden, top, drop_weights(kept, drop, ctx.dropout))
        for_outer = None
        if outer is not None and ctx.needs_input_grad[4]:
            units = scatter_entries(drop_weights(hidden.detach(), drop, ctx.dropout), index, ctx.width)
            for_outer = grad.mT @ units
        wide = [scatter_entries(each, index, ctx.width) for each in through]
        for_x = sum((a @ w for a, w in zip(wide, weights, strict=True)), torch.zeros_like(x))
        for_inner = [part for each in wide for part in (each.mT @ x, each.sum(0))]
        wanted = [g if need else None for g, need in zip(for_inner, ctx.needs_input_grad[5:], strict=True)]
        return for_x, None, None, None, for_outer, *wanted
