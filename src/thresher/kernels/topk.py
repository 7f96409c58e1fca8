"""Top-k attention's operator on CPUs: an exact selection without a sort, and gradients that touch kept pairs only.

Queries, keys and values are fp32, fp64 or bf16; whatever else is a real number is of the type that sums are made in,
fp32 with bf16.
"""

from typing import Any

import torch
from torch import Tensor

from thresher.kernels.calling import call, summed


@torch.library.custom_op("thresher::topk_attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None, limit: Tensor, most: int, shift: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the keys with the largest scores, of equal ones to the lower index first; nan counts as largest.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        scale: What products of queries and keys are multiplied by to be scores.
        seen: Keys that are not hidden, bool [g, m]; None is all.
        limit: How many keys each query keeps, int64 [g, n]; at most as many as it sees.
        most: The largest limit.
        shift: Where causal, query i sees keys j <= i + shift.

    Returns:
        Outputs [g, n, dv] and weights [g, n, most], in the type of sums; and the keys that weights belong to, int32,
        ascending, -1 where there is none.
    """
    q, k, v, limit = q.contiguous(), k.contiguous(), v.contiguous(), limit.contiguous()
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    out, weight = (q.new_empty(g, n, width, dtype=summed(q)) for width in (dv, most))
    index = q.new_empty(g, n, most, dtype=torch.int32)
    seen = None if seen is None else seen.contiguous()
    found, sizes, causal = (out, weight, index), (g, n, m, d, dv, most), (int(shift is not None), shift or 0)
    call("topk", "attend", q.dtype, q, k, v, scale, seen, limit, *found, *sizes, *causal)
    return out, weight, index


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None, limit: Tensor, most: int, shift: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    (g, n, _), dv = q.shape, v.shape[2]
    out, weight = (q.new_empty(g, n, width, dtype=summed(q)) for width in (dv, most))
    return out, weight, q.new_empty(g, n, most, dtype=torch.int32)


@torch.library.custom_op("thresher::topk_back", mutates_args=())
def back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to queries, keys and values, the selection held constant."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    into_q, into_k, into_v = (torch.empty_like(x, dtype=summed(x)) for x in (q, k, v))
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    given, into, sizes = (grad, q, k, v, scale, weight, index), (into_q, into_k, into_v), (g, n, m, d, dv)
    call("topk", "back", q.dtype, *given, *into, *sizes, weight.shape[2])
    return into


@back.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    into_q, into_k, into_v = (x.new_empty(x.shape, dtype=summed(x)) for x in (q, k, v))
    return into_q, into_k, into_v


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, *_ = inputs
    _, weight, index = output
    ctx.mark_non_differentiable(weight, index)
    ctx.save_for_backward(q, k, v, weight, index)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, weight, index = ctx.saved_tensors
    into_q, into_k, into_v = (x.to(q.dtype) for x in back(grad, q, k, v, ctx.scale, weight, index))
    return into_q, into_k, into_v, *(None,) * 5


attend.register_autograd(_backward, setup_context=_setup)
