"""The operators of blocks on CPUs: votes on estimates from integer codes, dense products with the keys of a block.

Queries, keys and values are fp32, fp64 or bf16. All other floating-point tensors have the type of sums, which is fp32
for bf16. Backward needs no lists of kept keys: a bit for each key of a block, and what the voters of the block counted,
bring them back.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.attention.latte.kernel import Gate, build_backward, list_gate_fields, new_gradients
from thresher.kernels.calling import Value, call, choose_sum_dtype
from thresher.kernels.operators import (
    flatten,
    name_inputs,
    save_for_backward,
)
from thresher.kernels.tail import new_tail_weights

KEYS = 64  # in a word of bits


class Sharing(NamedTuple):
    """How queries share keys.

    Attributes:
        size: Number of queries in a block.
        votes: Whether the queries of a block choose together; otherwise each chooses for itself.
        every: Of the queries of a block that are not hidden, each such one votes.
    """

    size: int
    votes: bool
    every: int


class Attention(NamedTuple):
    """What `attend` returns; floating-point numbers have the type of sums.

    Attributes:
        out: Outputs [g, n, dv].
        kept: The number of kept pairs, [g].
        of_rows: Those of each query, int32 [g, n].
        computed: The pairs of each query with the keys of its block, int32 [g, n].
        row_max: The largest score of each query's kept keys, [g, n].
        row_sum: The sum of exp(score - largest), tail included, [g, n].
        tail_weight: The weight of a dropped key without its factor, [g, n], or [g, 0] without a tail.
        chosen: A bit for each key of a block that votes, int64 [g, blocks, words]; [g, 0, 0] without votes.
        vote_max: The largest product of each voting query's codes, [g, n]; as the next three, [g, 0] without votes.
        vote_share: The weight of its exponentials in the votes of its block, [g, n].
        best: The log of the best vote of each block, [g, blocks].
        unit: The unit of differences between log votes, [g, blocks].
    """

    out: Tensor
    kept: Tensor
    of_rows: Tensor
    computed: Tensor
    row_max: Tensor
    row_sum: Tensor
    tail_weight: Tensor
    chosen: Tensor
    vote_max: Tensor
    vote_share: Tensor
    best: Tensor
    unit: Tensor


Many = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("thresher::blocks_attend", mutates_args=())
@flatten
def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tail_factor: Tensor | None, gate: Gate, sharing: Sharing
) -> Many:
    """Attend to the keys of each query's block.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        scale: Factor that turns products of queries and keys into scores.
        tail_factor: What the weights of dropped keys are multiplied by [g], in the type of sums; None is no tail.
        gate: How to select keys.
        sharing: How queries share them.

    Returns:
        The fields of `Attention`.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    found = _new_results(q, k, v, tail_factor, sharing)
    results = found._asdict()
    del results["kept"], results["of_rows"]
    call(
        "blocks",
        "attend",
        q.dtype,
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        kept=found.of_rows,
        **results,
        **_list_fields(q, v, gate, sharing),
    )
    return (*found._replace(kept=found.of_rows.sum(-1).to(found.out.dtype)),)


@attend.register_fake
@flatten
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, tail_factor: Tensor | None, gate: Gate, sharing: Sharing) -> Many:
    return (*_new_results(q, k, v, tail_factor, sharing),)


def _new_results(q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, sharing: Sharing) -> Attention:
    (g, n, _), m, dtype = q.shape, k.shape[1], choose_sum_dtype(q)
    voters, blocks, words = 0, 0, 0
    if sharing.votes:
        voters, blocks, words = n, -(-n // sharing.size), -(-m // KEYS)
    sizes = ((g, n, v.shape[2]), (g,), (g, n), (g, n), (g, voters), (g, voters), (g, blocks), (g, blocks))
    out, kept, row_max, row_sum, vote_max, vote_share, best, unit = (q.new_empty(*x, dtype=dtype) for x in sizes)
    return Attention(
        out=out,
        kept=kept,
        of_rows=q.new_empty(g, n, dtype=torch.int32),
        computed=q.new_empty(g, n, dtype=torch.int32),
        row_max=row_max,
        row_sum=row_sum,
        tail_weight=new_tail_weights(q, dtype, factor),
        chosen=q.new_empty(g, blocks, words, dtype=torch.int64),
        vote_max=vote_max,
        vote_share=vote_share,
        best=best,
        unit=unit,
    )


@torch.library.custom_op("thresher::blocks_back", mutates_args=())
@flatten
def back(
    grad: Tensor,
    grad_kept: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    tail_weight: Tensor,
    chosen: Tensor,
    vote_max: Tensor,
    vote_share: Tensor,
    best: Tensor,
    unit: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tail_factor: Tensor | None,
    gate: Gate,
    sharing: Sharing,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys, values, thresholds and factors of tails.

    Without a tail there is no gradient to factors, [0].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v, grad_threshold, grad_factor = new_gradients(q, k, v, gate.threshold, tail_factor)
    given = {"chosen": chosen, "vote_max": vote_max, "vote_share": vote_share, "best": best, "unit": unit}
    call(
        "blocks",
        "back",
        q.dtype,
        width=0.0 if gate.tau is None else 3 * float(gate.tau),
        queries=q,
        keys=k,
        values=v,
        scale=scale,
        out=out.contiguous(),
        row_max=row_max.contiguous(),
        row_sum=row_sum.contiguous(),
        tail_factor=None if tail_factor is None else tail_factor.contiguous(),
        tail_weight=tail_weight.contiguous(),
        grad=grad.contiguous(),
        grad_kept=grad_kept.contiguous(),
        grad_queries=grad_q,
        grad_keys=grad_k,
        grad_values=grad_v,
        grad_threshold=grad_threshold,
        grad_tail_factor=grad_factor,
        **{name: x.contiguous() for name, x in given.items()},
        **_list_fields(q, v, gate, sharing),
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
    chosen: Tensor,
    vote_max: Tensor,
    vote_share: Tensor,
    best: Tensor,
    unit: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tail_factor: Tensor | None,
    gate: Gate,
    sharing: Sharing,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return new_gradients(q, k, v, gate.threshold, tail_factor)


def _list_fields(q: Tensor, v: Tensor, gate: Gate, sharing: Sharing) -> dict[str, Value]:
    """List the fields of the C++ structs `Gate` and `Sharing`."""
    return {**list_gate_fields(q, v, gate), **sharing._asdict()}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Many) -> None:
    found = Attention(*output)
    ctx.mark_non_differentiable(*found[2:])
    results = found._asdict()
    del results["kept"], results["of_rows"], results["computed"]
    save_for_backward(ctx, name_inputs(attend, inputs) | results)


attend.register_autograd(build_backward(attend, back), setup_context=_setup)
