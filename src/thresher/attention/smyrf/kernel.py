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
from thresher.kernels.tail import new_factor_gradients, place_factor_gradients

RESULTS = ("out", "row_max", "row_sum", "meetings", "repeats", "dropped", "product", "base_keys", "base_values")


class Part(NamedTuple):
    """The tiles and clusters of some rounds; an empty slot holds the number of all tokens.

    In a causal part the keys of a cluster ascend. For a tail the first part contains every token that is not hidden.

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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    shift: int,
    tail_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend inside the clusters of all parts and merge the results; a query without keys gets zero.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        parts: Tiles and clusters.
        shift: In causal parts query i sees keys j <= i + shift.
        tail_factor: What the weights of dropped keys are multiplied by [g], in the type of sums; None is no tail.

    Returns:
        Outputs [g, n, dv] in the type of sums; for each group the number of meetings, and of those that repeat an
        earlier one.
    """
    layout = {name: [getattr(part, name) for part in parts] for name in Part._fields}
    out, _, _, meetings, repeats, *_ = attend_in_parts(q=q, k=k, v=v, shift=shift, tail_factor=tail_factor, **layout)
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
    q: Tensor, k: Tensor, v: Tensor, shift: int, tail_factor: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend like `attend`; return all of `RESULTS`, which its gradient needs.

    Each query has its largest score, `row_max`, and the sum of exp(score - row_max) over all meetings and the tail,
    `row_sum`, [g, n] each. The rest is empty without a tail: the number of keys that each query drops, and the product
    of the query with their sum, [g, n] each; the bases of keys and values, [g, bases, d] and [g, bases, dv], which
    csrc/smyrf_tail.h explains.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    results = _new_results(q, k, v, tail_factor, layout)
    out, row_max, row_sum, meetings, repeats, dropped, product, base_keys, base_values = results
    row_max.fill_(float("-inf"))
    for x in (row_sum, meetings, repeats):
        x.zero_()
    tail = _tail_fields(tail_factor, dropped, product, base_keys, base_values)
    fields = {
        "queries": q,
        "keys": k,
        "values": v,
        "out": out,
        "row_max": row_max,
        "row_sum": row_sum,
        "meetings": meetings,
        "repeats": repeats,
        **tail,
        **_sizes(q, k, v),
    }
    parts = _part_fields(layout, shift)
    if tail_factor is not None and len(parts) > 1:
        for part in parts:
            call("smyrf", "drop", q.dtype, **fields, **part)
    for part in parts:
        call("smyrf", "attend", q.dtype, **fields, **part)
    if (alone := row_sum == 0).any():
        out.masked_fill_(alone[..., None], 0)
    return results


@attend_in_parts.register_fake
@flatten
def _(
    q: Tensor, k: Tensor, v: Tensor, shift: int, tail_factor: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_results(q, k, v, tail_factor, layout)


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
    dropped: Tensor,
    product: Tensor,
    base_keys: Tensor,
    base_values: Tensor,
    shift: int,
    tail_factor: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to queries, keys, values and factors of tails from recomputed scores.

    Without a tail there is no gradient to factors, [0].
    """
    grad, q, k, v, out, row_max, row_sum = (x.contiguous() for x in (grad, q, k, v, out, row_max, row_sum))
    gradients = _new_gradients(q, k, v, tail_factor)
    dropped_benefit, weight, through = (dropped.new_empty(dropped.shape) for _ in range(3))
    fields = {
        "queries": q,
        "keys": k,
        "values": v,
        "out": out,
        "row_max": row_max,
        "row_sum": row_sum,
        "grad": grad,
        "dropped_benefit": dropped_benefit,
        "weight": weight,
        "through": through,
        **dict(zip(("grad_queries", "grad_keys", "grad_values", "grad_tail_factor"), gradients, strict=True)),
        **_tail_fields(tail_factor, dropped, product, base_keys, base_values),
        **_sizes(q, k, v),
    }
    parts = _part_fields(layout, shift)
    if tail_factor is None:
        for x in gradients[:3]:
            x.zero_()
    elif len(parts) > 1:
        for part in parts:
            call("smyrf", "drop_back", q.dtype, **fields, **part)
        call("smyrf", "start_back", q.dtype, **fields, **parts[0])
    for part in parts:
        call("smyrf", "back", q.dtype, **fields, **part)
    return gradients


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
    dropped: Tensor,
    product: Tensor,
    base_keys: Tensor,
    base_values: Tensor,
    shift: int,
    tail_factor: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(q, k, v, tail_factor)


def _new_results(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (g, n, d), dv, dtype = q.shape, v.shape[2], choose_sum_dtype(q)
    bases = 0 if factor is None else layout.token_k[0].shape[1] if layout.causal[0] else 1
    out, row_max, row_sum = (q.new_empty(size, dtype=dtype) for size in ((g, n, dv), (g, n), (g, n)))
    meetings, repeats = (q.new_empty(g, dtype=torch.long) for _ in range(2))
    dropped, product = (q.new_empty(g, 0 if factor is None else n, dtype=dtype) for _ in range(2))
    base_keys, base_values = (q.new_empty(g, bases, width, dtype=dtype) for width in (d, dv))
    return out, row_max, row_sum, meetings, repeats, dropped, product, base_keys, base_values


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = choose_sum_dtype(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    return grad_q, grad_k, grad_v, new_factor_gradients(q, dtype, factor)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """List the fields of the C++ struct `Sizes`."""
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    return {"groups": g, "n": n, "m": m, "d": d, "dv": dv}


def _part_fields(layout: Layout, shift: int) -> list[dict[str, Tensor | int | None]]:
    """List the fields of the C++ struct `Part`, and the place of a part among all, for each part."""
    parts = list(layout.iterate_parts())
    return [
        {
            "token_q": part.token_q.contiguous(),
            "token_k": part.token_k.contiguous(),
            "tile_cluster": part.tile_cluster.contiguous() if part.tile_cluster.numel() else None,
            "query_cluster": part.query_cluster.contiguous(),
            "key_cluster": part.key_cluster.contiguous(),
            "tiles": part.token_q.shape[1],
            "tile": part.token_q.shape[2],
            "clusters": part.token_k.shape[1],
            "cluster": part.token_k.shape[2],
            "rounds": len(part.query_cluster),
            "causal": part.causal,
            "shift": shift,
            "times": part.times,
            "first": place == 0,
            "alone": len(parts) == 1,
        }
        for place, part in enumerate(parts)
    ]


def _tail_fields(
    factor: Tensor | None, dropped: Tensor, product: Tensor, base_keys: Tensor, base_values: Tensor
) -> dict[str, Tensor | None]:
    """List the fields of the C++ struct `Tail` that are tensors."""
    fields = {"tail_factor": factor, "dropped": dropped, "product": product}
    fields |= {"base_keys": base_keys, "base_values": base_values}
    return {name: None if x is None else x.contiguous() for name, x in fields.items()}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    results = {name: x for name, x in zip(RESULTS, output, strict=True) if name not in ("meetings", "repeats")}
    save_for_backward(ctx, name_inputs(attend_in_parts, inputs) | results)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved = load_saved_values(ctx)
    *of_tokens, grad_factor = call_by_name(back, saved | {"grad": grad})
    gradients = {name: x.to(saved["q"].dtype) for name, x in zip("qkv", of_tokens, strict=True)}
    of_tail = place_factor_gradients(grad_factor, saved["tail_factor"])
    return place_gradients(attend_in_parts, saved, **gradients, **of_tail)


attend_in_parts.register_autograd(_backward, setup_context=_setup)
