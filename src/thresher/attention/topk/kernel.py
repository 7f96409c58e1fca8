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
    flatten,
    load_saved_values,
    name_inputs,
    place_gradients,
    save_for_backward,
)
from thresher.kernels.tail import TailInputs, place_tail_gradients


@torch.library.custom_op("thresher::topk_attend", mutates_args=())
@flatten
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    limit: Tensor,
    most: int,
    shift: int | None,
    tail: TailInputs,
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
        tail: What dropped keys weigh.

    Returns:
        Outputs [g, n, dv] and weights [g, n, most], in the type of sums; the key of each weight, int32, ascending, -1
        where there is none; and the weight of a dropped key without its factor [g, n], [g, 0] without a tail. With a
        tail, weights are what kept keys weigh more than dropped ones.
    """
    q, k, v, limit = q.contiguous(), k.contiguous(), v.contiguous(), limit.contiguous()
    out, weight, index, tail_weight = _new_results(q, v, most, tail)
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
        out=out,
        weights=weight,
        tail_weight=tail_weight,
        kept=index,
        **_sizes(q, v, most),
        **tail.fields(),
    )
    return out, weight, index, tail_weight


@attend.register_fake
@flatten
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    limit: Tensor,
    most: int,
    shift: int | None,
    tail: TailInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_results(q, v, most, tail)


def _new_results(q: Tensor, v: Tensor, most: int, tail: TailInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = choose_sum_dtype(q)
    out, weight = (q.new_empty(*q.shape[:2], width, dtype=dtype) for width in (v.shape[2], most))
    return out, weight, q.new_empty(*q.shape[:2], most, dtype=torch.int32), tail.new_rows(q, dtype)


def _sizes(q: Tensor, v: Tensor, most: int) -> dict[str, int]:
    (g, n, d), m, dv = q.shape, v.shape[1], v.shape[2]
    return {"groups": g, "n": n, "m": m, "d": d, "dv": dv, "most": most}


@torch.library.custom_op("thresher::topk_back", mutates_args=())
@flatten
def back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    weight: Tensor,
    index: Tensor,
    tail_weight: Tensor,
    out: Tensor | None,
    tail: TailInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys and values, with the selection held constant, and those of tails.

    The last two are the gradients to the sums of scores and to the factors, [g, n]; [g, 0] without a tail. `out` is
    needed with a tail only.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v, grad_scores, grad_factor = _new_gradients(q, k, v, tail)
    call(
        "topk",
        "back",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        weights=weight.contiguous(),
        kept=index.contiguous(),
        tail_weight=tail_weight.contiguous(),
        out=None if out is None else out.contiguous(),
        grad=grad.contiguous(),
        grad_queries=grad_q,
        grad_keys=grad_k,
        grad_values=grad_v,
        grad_tail_scores=grad_scores,
        grad_tail_factor=grad_factor,
        **_sizes(q, v, weight.shape[2]),
        **tail.fields(),
    )
    return grad_q, grad_k, grad_v, grad_scores, grad_factor


@back.register_fake
@flatten
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    weight: Tensor,
    index: Tensor,
    tail_weight: Tensor,
    out: Tensor | None,
    tail: TailInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(q, k, v, tail)


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, tail: TailInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = choose_sum_dtype(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    return grad_q, grad_k, grad_v, tail.new_rows(q, dtype), tail.new_rows(q, dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    out, weight, index, tail_weight = output
    ctx.mark_non_differentiable(weight, index, tail_weight)
    given = name_inputs(attend, inputs)
    read_again = {name: given[name] for name in ("q", "k", "v", "scale", *TailInputs._fields)}
    results = {"weight": weight, "index": index, "tail_weight": tail_weight}
    save_for_backward(ctx, read_again | results | {"out": None if given["tail_scores"] is None else out})


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = load_saved_values(ctx)
    *gradients, grad_scores, grad_factor = call_by_name(back, saved | {"grad": grad})
    tail = TailInputs(*(saved[name] for name in TailInputs._fields))
    of_tail = place_tail_gradients(grad, saved["tail_weight"], grad_scores, grad_factor, tail)
    of_tokens = {name: x.to(saved["q"].dtype) for name, x in zip("qkv", gradients, strict=True)}
    return place_gradients(attend, saved, **of_tokens, **of_tail)


attend.register_autograd(_backward, setup_context=_setup)
