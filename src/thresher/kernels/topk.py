"""Top-k attention's operator on CPUs: an exact selection without a sort, and gradients that touch kept pairs only."""

from typing import Any

import torch
from torch import Tensor

from thresher.kernels.calling import call


@torch.library.custom_op("thresher::topk_attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, limit: Tensor, most: int, shift: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the keys with the largest scores, of equal ones to the lower index first; nan counts as largest.

    Args:
        q: Queries [g, n, d], scaled.
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        seen: Keys that are not hidden, bool [g, m]; None is all.
        limit: How many keys each query keeps, int64 [g, n]; at most as many as it sees.
        most: The largest limit.
        shift: Where causal, query i sees keys j <= i + shift.

    Returns:
        Outputs [g, n, dv]; weights [g, n, most]; and the keys they belong to, int32, ascending, -1 where there is none.
    """
    q, k, v, limit = q.contiguous(), k.contiguous(), v.contiguous(), limit.contiguous()
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    out, weight = q.new_empty(g, n, dv), q.new_empty(g, n, most)
    index = q.new_empty(g, n, most, dtype=torch.int32)
    seen = None if seen is None else seen.contiguous()
    sizes = g, n, m, d, dv, most
    call(
        "topk", "attend", q.dtype, q, k, v, seen, limit, out, weight, index, *sizes, int(shift is not None), shift or 0
    )
    return out, weight, index


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, limit: Tensor, most: int, shift: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    (g, n, _), dv = q.shape, v.shape[2]
    return q.new_empty(g, n, dv), q.new_empty(g, n, most), q.new_empty(g, n, most, dtype=torch.int32)


@torch.library.custom_op("thresher::topk_back", mutates_args=())
def back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to queries, keys and values, the selection held constant."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    call("topk", "back", q.dtype, grad, q, k, v, weight, index, *into, g, n, m, d, dv, weight.shape[2])
    return into


@back.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *_ = inputs
    _, weight, index = output
    ctx.mark_non_differentiable(weight, index)
    ctx.save_for_backward(q, k, v, weight, index)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *back(grad, *ctx.saved_tensors), None, None, None, None


attend.register_autograd(_backward, setup_context=_setup)
