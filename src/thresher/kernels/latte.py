"""LATTE's operators on CPUs: estimates from integer codes, and exact work for kept pairs only.

Queries, keys and values are fp32, fp64 or bf16; whatever else is a real number is of the type that sums are made in,
fp32 with bf16, where processors that have such instructions multiply pairs of bf16.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.kernels.calling import call, summed


class Gate(NamedTuple):
    """How keys are chosen, in the order in which operators take it.

    Attributes:
        q_codes: Codes of queries, int8 [g, n, d].
        k_codes: Codes of keys, int8 [g, m, d].
        q_unit: What a code of a query stands for [g, n].
        k_unit: What a code of a key stands for, [g, m] or, where all share it, [g, 1].
        shown_q: Queries that are not hidden, bool [g, n]; None is all.
        shown_k: Keys that are not hidden, bool [g, m]; None is all.
        theta: Thresholds [g].
        tau: A third of how far from theta the gate has a gradient, 0-dimensional; None is a gate without gradient.
        shift: Where causal, query i sees keys j <= i + shift.
        spread: Whether thresholds count the distance from a row's best estimate to its mean one.
        always_keep: Number of leading keys that are kept wherever visible.
        step: What a product of two codes is multiplied by.
        into_scores: Whether the gate's gradient reaches scores.
        inside: Whether only kept keys have a part in it.
    """

    q_codes: Tensor
    k_codes: Tensor
    q_unit: Tensor
    k_unit: Tensor
    shown_q: Tensor | None
    shown_k: Tensor | None
    theta: Tensor
    tau: Tensor | None
    shift: int | None
    spread: bool
    always_keep: int
    step: float
    into_scores: bool
    inside: bool


@torch.library.custom_op("thresher::latte_encode", mutates_args=())
def encode(x: Tensor, per_token: bool, bits: int, truncate: bool) -> tuple[Tensor, Tensor]:
    """Return the high bits of 8-bit codes, int8 [g, n, d], and what a code stands for, [g, n] or [g, 1].

    As `attention.quantise` does; what is no number has the code 0.

    Args:
        x: Queries or keys [g, n, d].
        per_token: One scale for each token instead of one for each group.
        bits: Bits of the codes that are kept.
        truncate: Take the top bits of two's complement instead of rounding.
    """
    x = x.contiguous()
    g, n, d = x.shape
    codes, unit = torch.empty_like(x, dtype=torch.int8), x.new_empty(g, n if per_token else 1, dtype=summed(x))
    call("latte", "encode", x.dtype, x, g, n, d, int(per_token), bits, int(truncate), codes, unit)
    return codes, unit


@encode.register_fake
def _(x: Tensor, per_token: bool, bits: int, truncate: bool) -> tuple[Tensor, Tensor]:
    unit = x.new_empty(x.shape[0], x.shape[1] if per_token else 1, dtype=summed(x))
    return torch.empty_like(x, dtype=torch.int8), unit


@torch.library.custom_op("thresher::latte_attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_codes: Tensor,
    k_codes: Tensor,
    q_unit: Tensor,
    k_unit: Tensor,
    shown_q: Tensor | None,
    shown_k: Tensor | None,
    theta: Tensor,
    tau: Tensor | None,
    shift: int | None,
    spread: bool,
    always_keep: int,
    step: float,
    into_scores: bool,
    inside: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to the keys whose estimate lies within theta of the best of their row.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        q_codes: This, and what follows up to `inside`, is a `Gate`.
        scale: What products of queries and keys are multiplied by to be scores.

    Returns:
        Outputs [g, n, dv]; the number of pairs kept [g], in the type of sums; of each query [g, n] the best score of
        its kept keys, and the sum of the exponentials of their scores below it.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (g, n, _), dv, dtype = q.shape, v.shape[2], summed(q)
    out, top, mass = (q.new_empty(*size, dtype=dtype) for size in ((g, n, dv), (g, n), (g, n)))
    kept = q.new_empty(g, n, dtype=torch.int32)
    gate = Gate(
        *(q_codes, k_codes, q_unit, k_unit, shown_q, shown_k, theta, tau, shift, spread, always_keep, step),
        into_scores=into_scores,
        inside=inside,
    )
    call("latte", "attend", q.dtype, *_passed(q, v, gate), q, k, v, scale, out, kept, top, mass)
    return out, kept.sum(-1).to(dtype), top, mass


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *gate: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (g, n, _), dv = q.shape, v.shape[2]
    out, kept, top, mass = (q.new_empty(*size, dtype=summed(q)) for size in ((g, n, dv), (g,), (g, n), (g, n)))
    return out, kept, top, mass


@torch.library.custom_op("thresher::latte_back", mutates_args=())
def back(
    grad: Tensor,
    grad_kept: Tensor,
    out: Tensor,
    top: Tensor,
    mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_codes: Tensor,
    k_codes: Tensor,
    q_unit: Tensor,
    k_unit: Tensor,
    shown_q: Tensor | None,
    shown_k: Tensor | None,
    theta: Tensor,
    tau: Tensor | None,
    shift: int | None,
    spread: bool,
    always_keep: int,
    step: float,
    into_scores: bool,
    inside: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to queries, keys, values and thresholds; estimates are made again."""
    q, k, v, grad, grad_kept = (x.contiguous() for x in (q, k, v, grad, grad_kept))
    gate = Gate(
        *(q_codes, k_codes, q_unit, k_unit, shown_q, shown_k, theta, tau, shift, spread, always_keep, step),
        into_scores=into_scores,
        inside=inside,
    )
    into_q, into_k, into_v = (torch.empty_like(x, dtype=summed(x)) for x in (q, k, v))
    into = into_q, into_k, into_v, torch.empty_like(theta)
    given = grad, grad_kept, q, k, v, scale, out, top, mass
    width = 0.0 if tau is None else 3 * float(tau)
    call("latte", "back", q.dtype, *_passed(q, v, gate), *given, width, int(inside), int(into_scores), *into)
    return into


@back.register_fake
def _(
    grad: Tensor, grad_kept: Tensor, out: Tensor, top: Tensor, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, *gate: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    into_q, into_k, into_v = (x.new_empty(x.shape, dtype=summed(x)) for x in (q, k, v))
    return into_q, into_k, into_v, gate[6].new_empty(gate[6].shape)


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
    theta: Tensor,
    spread: bool,
    always_keep: int,
    step: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend as `attend` does, for queries that each see all keys of their group; it has no gradient.

    Nothing is made of the keys, and the numbers of those that are dropped are not read.

    Args:
        q: Queries that share keys [g, r, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        q_codes: Codes of queries, int8 [g, r, d].
        k_codes: Codes of keys, int8 [g, m, d].
        q_unit: What a code of a query stands for [g, r].
        k_unit: What a code of a key stands for [g, m].
        shown_k: Keys that are not hidden, bool [g, m]; None is all.
        theta: Thresholds [g, r].
        spread: This, and what follows, is as in a `Gate` and in `attend`.

    Returns:
        Outputs [g, r, dv], and the number of keys kept [g, r], in the type of sums.
    """
    q, k, v, q_codes, k_codes = (x.contiguous() for x in (q, k, v, q_codes, k_codes))
    (g, rows, d), m, dv = q.shape, v.shape[1], v.shape[2]
    out, kept = q.new_empty(g, rows, dv, dtype=summed(q)), q.new_empty(g, rows, dtype=torch.int32)
    shown = None if shown_k is None else shown_k.contiguous()
    judged = q_codes, k_codes, q_unit.contiguous(), k_unit.contiguous(), shown, theta.contiguous()
    sizes = g, rows, m, d, dv, int(spread), always_keep, step
    call("latte", "decode", q.dtype, *judged, *sizes, q, k, v, scale, out, kept)
    return out, kept.to(out.dtype)


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2], dtype=summed(q)), q.new_empty(q.shape[:2], dtype=summed(q))


def _passed(q: Tensor, v: Tensor, gate: Gate) -> list[Tensor | int | float | None]:
    (g, n, d), m, dv = q.shape, v.shape[1], v.shape[2]
    tensors = [x if x is None else x.contiguous() for x in gate[:7]]
    causal = int(gate.shift is not None), gate.shift or 0
    each_key = int(gate.k_unit.shape[1] > 1)
    return [*tensors, g, n, m, d, dv, *causal, int(gate.spread), gate.always_keep, each_key, gate.step]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    out, _, top, mass = output
    ctx.mark_non_differentiable(top, mass)
    ctx.save_for_backward(out, top, mass, *inputs[:11])
    ctx.settings = inputs[11:]


def _backward(ctx: Any, grad: Tensor, grad_kept: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *into, into_theta = back(grad, grad_kept, *ctx.saved_tensors, *ctx.settings)
    into_q, into_k, into_v = (x.to(ctx.saved_tensors[3].dtype) for x in into)
    return into_q, into_k, into_v, *(None,) * 6, into_theta, *(None,) * 8


attend.register_autograd(_backward, setup_context=_setup)
