"""The operator of top-k attention on CPUs: exact selection without a sort, gradients over kept pairs only.

Queries, keys and values are fp32, fp64 or bf16. All other floating-point tensors have the type of sums, which is fp32
for bf16.
"""

from typing import Any

import torch
from torch import Tensor

from thresher.kernels.calling import call, choose_sum_dtype
from thresher.kernels.operators import (
    call_by_name,
    load_saved_values,
    name_inputs,
    place_gradients,
    save_for_backward,
)
from thresher.kernels.tail import new_factor_gradients, new_tail_weights, place_factor_gradients


@torch.library.custom_op("thresher::topk_attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    limit: Tensor,
    most: int,
    shift: int | None,
    tail_factor: Tensor | None,
    key_sum: Tensor | None = None,
    value_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to the keys with the largest scores, the lower index first if equal; NaN counts as largest.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        scale: Factor of scores: a score is this times the product of query and key.
        seen: Keys that are not hidden, bool [g, m]; None means all.
        limit: Number of keys that each query keeps, int64 [g, n]; at most as many as it sees.
        most: The largest limit.
        shift: Query i sees keys j <= i + shift; None without causality.
        tail_factor: What the weights of dropped keys are multiplied by [g], in the type of sums; None is no tail.
        key_sum: Sums of the keys [g, d] that a single query sees, in the type of sums; None sums them for a tail.
        value_sum: Likewise of the values [g, dv].

    Returns:
        Outputs [g, n, dv] and weights [g, n, most], in the type of sums; the key of each weight, int32, ascending, -1
        where there is none; and the weight of a dropped key without its factor [g, n], [g, 0] without a tail. With a
        tail, weights are what kept keys weigh more than dropped ones.
    """
    q, k, v, limit = q.contiguous(), k.contiguous(), v.contiguous(), limit.contiguous()
    out, weight, index, tail_weight = _new_results(q, v, most, tail_factor)
    call(
        "topk",
        "attend",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        seen=None if seen is None else seen.contiguous(),
        limit=limit,
        causal=shift is not None,
        shift=shift or 0,
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        key_sum=None if key_sum is None else key_sum.contiguous(),
        value_sum=None if value_sum is None else value_sum.contiguous(),
        out=out,
        weights=weight,
        tail_weight=tail_weight,
        kept=index,
        **_sizes(q, v, most),
    )
    return out, weight, index, tail_weight


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    limit: Tensor,
    most: int,
    shift: int | None,
    tail_factor: Tensor | None,
    key_sum: Tensor | None = None,
    value_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_results(q, v, most, tail_factor)


def _new_results(q: Tensor, v: Tensor, most: int, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = choose_sum_dtype(q)
    out, weight = (q.new_empty(*q.shape[:2], width, dtype=dtype) for width in (v.shape[2], most))
    return out, weight, q.new_empty(*q.shape[:2], most, dtype=torch.int32), new_tail_weights(q, dtype, factor)


def _sizes(q: Tensor, v: Tensor, most: int) -> dict[str, int]:
    (g, n, d), m, dv = q.shape, v.shape[1], v.shape[2]
    return {"groups": g, "n": n, "m": m, "d": d, "dv": dv, "most": most}


@torch.library.custom_op("thresher::topk_back", mutates_args=())
def back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    shift: int | None,
    weight: Tensor,
    index: Tensor,
    tail_weight: Tensor,
    out: Tensor | None,
    tail_factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys and values, with the selection held constant, and to factors of tails.

    `out` is needed with a tail only. Without one there is no gradient to factors, [0].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v, grad_factor = _new_gradients(q, k, v, tail_factor)
    call(
        "topk",
        "back",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        seen=None if seen is None else seen.contiguous(),
        causal=shift is not None,
        shift=shift or 0,
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        weights=weight.contiguous(),
        kept=index.contiguous(),
        tail_weight=tail_weight.contiguous(),
        out=None if out is None else out.contiguous(),
        grad=grad.contiguous(),
        grad_queries=grad_q,
        grad_keys=grad_k,
        grad_values=grad_v,
        grad_tail_factor=grad_factor,
        **_sizes(q, v, weight.shape[2]),
    )
    return grad_q, grad_k, grad_v, grad_factor


@back.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    shift: int | None,
    weight: Tensor,
    index: Tensor,
    tail_weight: Tensor,
    out: Tensor | None,
    tail_factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(q, k, v, tail_factor)


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = choose_sum_dtype(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    return grad_q, grad_k, grad_v, new_factor_gradients(q, dtype, factor)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    out, weight, index, tail_weight = output
    ctx.mark_non_differentiable(weight, index, tail_weight)
    given = name_inputs(attend, inputs)
    read_again = {name: given[name] for name in ("q", "k", "v", "scale", "seen", "shift", "tail_factor")}
    results = {"weight": weight, "index": index, "tail_weight": tail_weight}
    save_for_backward(ctx, read_again | results | {"out": None if given["tail_factor"] is None else out})


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = load_saved_values(ctx)
    *gradients, grad_factor = call_by_name(back, saved | {"grad": grad})
    of_tail = place_factor_gradients(grad_factor, saved["tail_factor"])
    of_tokens = {name: x.to(saved["q"].dtype) for name, x in zip("qkv", gradients, strict=True)}
    return place_gradients(attend, saved, **of_tokens, **of_tail)


attend.register_autograd(_backward, setup_context=_setup)
