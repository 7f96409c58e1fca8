"""The operators of LATTE on CPUs: estimates from integer codes, exact scores for kept pairs only.

Queries, keys and values are fp32, fp64 or bf16. All other floating-point tensors have the type of sums, which is fp32
for bf16. Processors with such instructions multiply pairs of bf16 numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef

from thresher.kernels.calling import call, choose_sum_dtype
from thresher.kernels.operators import (
    call_by_name,
    flatten,
    load_saved_values,
    name_inputs,
    place_gradients,
    save_for_backward,
)
from thresher.kernels.tail import new_factor_gradients, new_tail_weights, place_factor_gradients


class Gate(NamedTuple):
    """How to select keys.

    Attributes:
        q_codes: Codes of queries, int8 [g, n, d].
        k_codes: Codes of keys, int8 [g, m, d].
        q_unit: Unit of the codes of each query, [g, n].
        k_unit: Unit of the codes of each key, [g, m], or [g, 1] if all keys share it.
        shown_q: Queries that are not hidden, bool [g, n]; None means all.
        shown_k: Keys that are not hidden, bool [g, m]; None means all.
        threshold: Thresholds [g].
        tau: A third of the distance to the threshold within which pairs have a gradient, []; None disables it.
        shift: Query i sees keys j <= i + shift; None without causality.
        spread: Whether the unit of thresholds is the distance from a row's best estimate to its mean.
        always_keep: Number of leading keys that are kept where visible.
        step: Factor of the product of two codes.
        into_scores: Whether the gate's gradient reaches scores.
        inside: Whether only kept keys contribute to that gradient.
    """

    q_codes: Tensor
    k_codes: Tensor
    q_unit: Tensor
    k_unit: Tensor
    shown_q: Tensor | None
    shown_k: Tensor | None
    threshold: Tensor
    tau: Tensor | None
    shift: int | None
    spread: bool
    always_keep: int
    step: float
    into_scores: bool
    inside: bool


@torch.library.custom_op("thresher::latte_encode", mutates_args=())
def encode(x: Tensor, per_token: bool, bits: int, truncate: bool) -> tuple[Tensor, Tensor]:
    """Encode tokens: the high bits of 8-bit codes, int8 [g, n, d], and their unit, [g, n] or [g, 1].

    The result is that of `quantise.py`; NaN has the code 0.

    Args:
        x: Queries or keys [g, n, d].
        per_token: One scale for each token instead of one for each group.
        bits: Number of high bits.
        truncate: Take the top bits of two's complement instead of rounding.
    """
    x = x.contiguous()
    g, n, d = x.shape
    codes, unit = _new_codes(x, per_token)
    call(
        "latte",
        "encode",
        x.dtype,
        tokens=x,
        codes=codes,
        unit=unit,
        groups=g,
        n=n,
        d=d,
        per_token=per_token,
        bits=bits,
        truncate=truncate,
    )
    return codes, unit


@encode.register_fake
def _(x: Tensor, per_token: bool, bits: int, truncate: bool) -> tuple[Tensor, Tensor]:
    return _new_codes(x, per_token)


def _new_codes(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    unit = x.new_empty(x.shape[0], x.shape[1] if per_token else 1, dtype=choose_sum_dtype(x))
    return x.new_empty(x.shape, dtype=torch.int8), unit


@torch.library.custom_op("thresher::latte_attend", mutates_args=())
@flatten
def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tail_factor: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend to the keys whose estimate lies within the threshold of the best of their row.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        scale: Factor that turns products of queries and keys into scores.
        tail_factor: What the weights of dropped keys are multiplied by [g], in the type of sums; None is no tail.
        gate: How to select keys.

    Returns:
        Outputs [g, n, dv]; the number of kept pairs [g], in the type of sums; for each query [g, n] the largest score
        of its kept keys, the sum of exp(score - largest), tail included, and the weight of a dropped key without its
        factor ([g, 0] without a tail).
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, row_max, row_sum, tail_weight = _new_results(q, v, tail_factor)
    kept = q.new_empty(q.shape[:2], dtype=torch.int32)
    call(
        "latte",
        "attend",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        out=out,
        kept=kept,
        row_max=row_max,
        row_sum=row_sum,
        tail_weight=tail_weight,
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        **list_gate_fields(q, v, gate),
    )
    return out, kept.sum(-1).to(out.dtype), row_max, row_sum, tail_weight


@attend.register_fake
@flatten
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tail_factor: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, row_max, row_sum, tail_weight = _new_results(q, v, tail_factor)
    return out, out.new_empty(out.shape[0]), row_max, row_sum, tail_weight


def _new_results(q: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (g, n, _), dv, dtype = q.shape, v.shape[2], choose_sum_dtype(q)
    out, row_max, row_sum = (q.new_empty(*size, dtype=dtype) for size in ((g, n, dv), (g, n), (g, n)))
    return out, row_max, row_sum, new_tail_weights(q, dtype, factor)


@torch.library.custom_op("thresher::latte_back", mutates_args=())
@flatten
def back(
    grad: Tensor,
    grad_kept: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    tail_weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tail_factor: Tensor | None,
    gate: Gate,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys, values, thresholds and factors of tails, with recomputed estimates.

    Without a tail there is no gradient to factors, [0].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v, grad_threshold, grad_factor = new_gradients(q, k, v, gate.threshold, tail_factor)
    call(
        "latte",
        "back",
        q.dtype,
        width=0.0 if gate.tau is None else 3 * float(gate.tau),
        inside=gate.inside,
        into_scores=gate.into_scores,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        out=out.contiguous(),
        row_max=row_max.contiguous(),
        row_sum=row_sum.contiguous(),
        grad=grad.contiguous(),
        grad_kept=grad_kept.contiguous(),
        grad_queries=grad_q,
        grad_keys=grad_k,
        grad_values=grad_v,
        grad_threshold=grad_threshold,
        tail_weight=tail_weight.contiguous(),
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        grad_tail_factor=grad_factor,
        **list_gate_fields(q, v, gate),
    )
    return grad_q, grad_k, grad_v, grad_threshold, grad_factor


@back.register_fake
@flatten
def _(
    grad: Tensor,
    grad_kept: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    tail_weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tail_factor: Tensor | None,
    gate: Gate,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return new_gradients(q, k, v, gate.threshold, tail_factor)


def new_gradients(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients to queries, keys, values, thresholds and factors of tails."""
    dtype = choose_sum_dtype(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    return grad_q, grad_k, grad_v, threshold.new_empty(threshold.shape), new_factor_gradients(q, dtype, factor)


@torch.library.custom_op("thresher::latte_decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_codes: Tensor,
    k_codes: Tensor,
    q_unit: Tensor,
    k_unit: Tensor,
    shown_k: Tensor | None,
    threshold: Tensor,
    spread: bool,
    always_keep: int,
    step: float,
    scale: float,
    key_sum: Tensor | None,
    value_sum: Tensor | None,
    tail_factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend like `attend`, without gradient, for queries that see all keys of their group.

    The numbers of dropped keys are not read.

    Args:
        q: Queries that share keys [g, r, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        q_codes: Codes of queries, int8 [g, r, d].
        k_codes: Codes of keys, int8 [g, m, d].
        q_unit: Unit of the codes of each query, [g, r].
        k_unit: Unit of the codes of each key, [g, m].
        shown_k: Keys that are not hidden, bool [g, m]; None means all.
        threshold: Thresholds [g, r].
        spread: See `Gate`.
        always_keep: See `Gate`.
        step: See `Gate`.
        scale: See `attend`.
        key_sum: Sums of the visible keys [g, d], in the type of sums; None without a tail.
        value_sum: Sums of their values [g, dv].
        tail_factor: What the weights of dropped keys are multiplied by [g, r]; None is no tail.

    Returns:
        Outputs [g, r, dv] and the number of kept keys [g, r], in the type of sums.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (g, rows, d), m, dv = q.shape, v.shape[1], v.shape[2]
    out, kept = q.new_empty(g, rows, dv, dtype=choose_sum_dtype(q)), q.new_empty(g, rows, dtype=torch.int32)
    call(
        "latte",
        "decode",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        q_codes=q_codes.contiguous(),
        k_codes=k_codes.contiguous(),
        q_unit=q_unit.contiguous(),
        k_unit=k_unit.contiguous(),
        shown_k=None if shown_k is None else shown_k.contiguous(),
        threshold=threshold.contiguous(),
        groups=g,
        rows=rows,
        m=m,
        d=d,
        dv=dv,
        spread=spread,
        always_keep=always_keep,
        step=step,
        scale=scale,
        key_sum=None if key_sum is None else key_sum.contiguous(),
        value_sum=None if value_sum is None else value_sum.contiguous(),
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        out=out,
        kept=kept,
    )
    return out, kept.to(out.dtype)


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2], dtype=choose_sum_dtype(q)), q.new_empty(
        q.shape[:2], dtype=choose_sum_dtype(q)
    )


def list_gate_fields(q: Tensor, v: Tensor, gate: Gate) -> dict[str, Tensor | int | float | None]:
    """List the fields of the C++ struct `Gate`."""
    (g, n, d), m, dv = q.shape, v.shape[1], v.shape[2]
    return {
        "q_codes": gate.q_codes.contiguous(),
        "k_codes": gate.k_codes.contiguous(),
        "q_unit": gate.q_unit.contiguous(),
        "k_unit": gate.k_unit.contiguous(),
        "shown_q": None if gate.shown_q is None else gate.shown_q.contiguous(),
        "shown_k": None if gate.shown_k is None else gate.shown_k.contiguous(),
        "threshold": gate.threshold.contiguous(),
        "groups": g,
        "n": n,
        "m": m,
        "d": d,
        "dv": dv,
        "causal": gate.shift is not None,
        "shift": gate.shift or 0,
        "spread": gate.spread,
        "always_keep": gate.always_keep,
        "unit_per_key": gate.k_unit.shape[1] > 1,
        "step": gate.step,
    }


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    out, _, row_max, row_sum, tail_weight = output
    ctx.mark_non_differentiable(row_max, row_sum, tail_weight)
    results = {"out": out, "row_max": row_max, "row_sum": row_sum, "tail_weight": tail_weight}
    save_for_backward(ctx, name_inputs(attend, inputs) | results)


def build_backward(attend: CustomOpDef, back: CustomOpDef) -> Callable[..., tuple[Tensor | None, ...]]:
    """Build the backward of an operator that attends by a gate, from the operator of its gradients."""

    def backward(ctx: Any, grad: Tensor, grad_kept: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = load_saved_values(ctx)
        inputs = saved | {"grad": grad, "grad_kept": grad_kept}
        *of_tokens, grad_threshold, grad_factor = call_by_name(back, inputs)
        gradients = {name: x.to(saved["q"].dtype) for name, x in zip("qkv", of_tokens, strict=True)}
        of_tail = place_factor_gradients(grad_factor, saved["tail_factor"])
        return place_gradients(attend, saved, **gradients, threshold=grad_threshold, **of_tail)

    return backward


attend.register_autograd(build_backward(attend, back), setup_context=_setup)
