"""The operators of SMYRF on CPUs: rank hash values, attend inside clusters and merge the results.

Queries, keys and values are fp32, fp64 or bf16. All other floating-point tensors have the type of sums, which is fp32
for bf16.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """The tiles and clusters of some rounds; an empty slot holds the number of all tokens.

    Attributes:
        token_q: The query in each slot of each tile, [g, tiles, s]; the tiles of a round are adjacent.
        token_k: The key in each slot of each cluster, [g, clusters, c].
        tile_cluster: Cluster of each tile, ascending, [g, tiles]; empty, [0], means one tile for each cluster.
        query_cluster: Cluster of each query in each round, [r, g, n].
        key_cluster: Cluster of each key in each round, [r, g, m].
        causal: Whether causality hides keys after a query.
        times: Weight of each meeting of a query with a key.
    """

    token_q: Tensor
    token_k: Tensor
    tile_cluster: Tensor
    query_cluster: Tensor
    key_cluster: Tensor
    causal: bool
    times: int


class Layout(NamedTuple):
    """All parts in the form that operators take: each field of `Part` becomes a list."""

    token_q: Sequence[Tensor]
    token_k: Sequence[Tensor]
    tile_cluster: Sequence[Tensor]
    query_cluster: Sequence[Tensor]
    key_cluster: Sequence[Tensor]
    causal: Sequence[bool]
    times: Sequence[int]

    def iterate_parts(self) -> Iterator[Part]:
        """Iterate over parts."""
        for values in zip(*self, strict=True):
            yield Part(**dict(zip(Part._fields, values, strict=True)))


def attend(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attend inside the clusters of all parts and merge the results; a query without keys gets zero.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        parts: Tiles and clusters.
        shift: In causal parts query i sees keys j <= i + shift.

    Returns:
        Outputs [g, n, dv] in the type of sums; for each group the number of meetings, and of those that repeat an
        earlier one.
    """
    layout = {name: [getattr(part, name) for part in parts] for name in Part._fields}
    out, _, _, meetings, repeats = attend_in_parts(q=q, k=k, v=v, shift=shift, **layout)
    return out, meetings, repeats


@torch.library.custom_op("thresher::smyrf_rank", mutates_args=())
def compute_ranks(x: Tensor) -> Tensor:
    """Rank hash values, fp32 or fp64 [r, g, n], in ascending order; equal values rank by index.

    The result is that of `layout.compute_ranks`.
    """
    x = x.contiguous()
    rank = x.new_empty(x.shape, dtype=torch.long)
    call("smyrf", "rank", x.dtype, hashes=x, ranks=rank, rows=x.shape[0] * x.shape[1], n=x.shape[2])
    return rank


@compute_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.long)


@torch.library.custom_op("thresher::smyrf_attend", mutates_args=())
@flatten
def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, shift: int, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend like `attend`; return also two numbers of each query, [g, n], after the outputs.

    These are its largest score and the sum of exp(score - largest) over all meetings.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, row_max, row_sum, meetings, repeats = _new_results(q, k, v)
    row_max.fill_(float("-inf"))
    for x in (row_sum, meetings, repeats):
        x.zero_()
    sizes = _sizes(q, k, v)
    for part in layout.iterate_parts():
        call(
            "smyrf",
            "attend",
            q.dtype,
            queries=q,
            keys=k,
            values=v,
            out=out,
            row_max=row_max,
            row_sum=row_sum,
            meetings=meetings,
            repeats=repeats,
            **sizes,
            **_part_fields(part, shift),
        )
    if (alone := row_sum == 0).any():
        out.masked_fill_(alone[..., None], 0)
    return out, row_max, row_sum, meetings, repeats


@attend_in_parts.register_fake
@flatten
def _(q: Tensor, k: Tensor, v: Tensor, shift: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_results(q, k, v)


@torch.library.custom_op("thresher::smyrf_back", mutates_args=())
@flatten
def back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    shift: int,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys and values from recomputed scores."""
    grad, q, k, v, out, row_max, row_sum = (x.contiguous() for x in (grad, q, k, v, out, row_max, row_sum))
    grad_q, grad_k, grad_v = (x.zero_() for x in _new_gradients(q, k, v))
    sizes = _sizes(q, k, v)
    for part in layout.iterate_parts():
        call(
            "smyrf",
            "back",
            q.dtype,
            queries=q,
            keys=k,
            values=v,
            out=out,
            row_max=row_max,
            row_sum=row_sum,
            grad=grad,
            grad_queries=grad_q,
            grad_keys=grad_k,
            grad_values=grad_v,
            **sizes,
            **_part_fields(part, shift),
        )
    return grad_q, grad_k, grad_v


@back.register_fake
@flatten
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    shift: int,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(q, k, v)


def _new_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (g, n, _), dv = q.shape, v.shape[2]
    out, row_max, row_sum = (q.new_empty(size, dtype=choose_sum_dtype(q)) for size in ((g, n, dv), (g, n), (g, n)))
    meetings, repeats = (q.new_empty(g, dtype=torch.long) for _ in range(2))
    return out, row_max, row_sum, meetings, repeats


def _new_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=choose_sum_dtype(x)) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """List the fields of the C++ struct `Sizes`."""
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    return {"groups": g, "n": n, "m": m, "d": d, "dv": dv}


def _part_fields(part: Part, shift: int) -> dict[str, Tensor | int | None]:
    """List the fields of the C++ struct `Part`."""
    (_, tiles, tile), (_, clusters, cluster) = part.token_q.shape, part.token_k.shape
    return {
        "token_q": part.token_q.contiguous(),
        "token_k": part.token_k.contiguous(),
        "tile_cluster": part.tile_cluster.contiguous() if part.tile_cluster.numel() else None,
        "query_cluster": part.query_cluster.contiguous(),
        "key_cluster": part.key_cluster.contiguous(),
        "tiles": tiles,
        "tile": tile,
        "clusters": clusters,
        "cluster": cluster,
        "rounds": len(part.query_cluster),
        "causal": part.causal,
        "shift": shift,
        "times": part.times,
    }


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, row_max, row_sum, meetings, repeats = output
    ctx.mark_non_differentiable(row_max, row_sum, meetings, repeats)
    results = {"out": out, "row_max": row_max, "row_sum": row_sum}
    save_for_backward(ctx, name_inputs(attend_in_parts, inputs) | results)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved = load_saved_values(ctx)
    gradients = zip("qkv", call_by_name(back, saved | {"grad": grad}), strict=True)
    return place_gradients(attend_in_parts, saved, **{name: x.to(saved["q"].dtype) for name, x in gradients})


attend_in_parts.register_autograd(_backward, setup_context=_setup)
