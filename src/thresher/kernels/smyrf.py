"""SMYRF's operators on CPUs: hash values sorted, and attention inside clusters, merged, with its gradients.

Queries, keys and values are fp32, fp64 or bf16; whatever else is a real number is of the type that sums are made in,
fp32 with bf16.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.kernels.calling import call, summed

Tensors = Sequence[Tensor]


class Part(NamedTuple):
    """Which queries meet which keys in some rounds; a token that is not there has the number of all tokens.

    Attributes:
        token_q: The query in each slot of each tile, [g, tiles, s]; the tiles of a round lie side by side.
        token_k: The key in each slot of each cluster, [g, clusters, c].
        of_tile: Cluster that each tile attends to, ascending, [g, tiles]; empty, [0], is one tile for each cluster.
        of_query: Cluster of each query in each round, [r, g, n].
        of_key: Cluster of each key in each round, [r, g, m].
        causal: Whether keys after a query are hidden from it.
        times: How often each meeting counts.
    """

    token_q: Tensor
    token_k: Tensor
    of_tile: Tensor
    of_query: Tensor
    of_key: Tensor
    causal: bool
    times: int


def attend(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attend inside the clusters of all parts and merge them; a query that meets nothing gets zero.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        parts: Which queries meet which keys.
        shift: In causal parts query i sees keys j <= i + shift.

    Returns:
        Outputs [g, n, dv] in the type of sums, and for each group how many pairs met, each time counted, and how many
        had met before.
    """
    layout = [x for part in parts for x in part[:5]]
    kinds = [x for part in parts for x in (int(part.causal), part.times)]
    out, _, _, met, again = merged(q, k, v, layout, kinds, shift)
    return out, met, again


@torch.library.custom_op("thresher::smyrf_rank", mutates_args=())
def rank_of(x: Tensor) -> Tensor:
    """Return the place of each hash value, fp32 or fp64 [r, g, n], in ascending order, of equal ones the first first.

    As `attention.layout.rank_of` does.
    """
    x = x.contiguous()
    rank = torch.empty_like(x, dtype=torch.long)
    call("smyrf", "rank", x.dtype, x, x.shape[0] * x.shape[1], x.shape[2], rank)
    return rank


@rank_of.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.long)


@torch.library.custom_op("thresher::smyrf_attend", mutates_args=())
def merged(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensors, kinds: Sequence[int], shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do what `attend` does; also return the best score of each query and the sum of exp(score - best), [g, n]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, top, mass, met, again = _results(q, k, v)
    top.fill_(float("-inf"))
    for x in (mass, met, again):
        x.zero_()
    for part in _parts(q, k, v, layout, kinds, shift):
        call("smyrf", "attend", q.dtype, q, k, v, out, top, mass, met, again, *part)
    if (alone := mass == 0).any():
        out.masked_fill_(alone[..., None], 0)
    return out, top, mass, met, again


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (g, n, _), dv = q.shape, v.shape[2]
    out, top, mass = (q.new_empty(size, dtype=summed(q)) for size in ((g, n, dv), (g, n), (g, n)))
    met, again = (q.new_empty(g, dtype=torch.long) for _ in range(2))
    return out, top, mass, met, again


@merged.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensors, kinds: Sequence[int], shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _results(q, k, v)


@torch.library.custom_op("thresher::smyrf_back", mutates_args=())
def back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    mass: Tensor,
    layout: Tensors,
    kinds: Sequence[int],
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to queries, keys and values, from scores that are computed again."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    into_q, into_k, into_v = (torch.zeros_like(x, dtype=summed(x)) for x in (q, k, v))
    for part in _parts(q, k, v, layout, kinds, shift):
        call("smyrf", "back", q.dtype, grad, q, k, v, out, top, mass, into_q, into_k, into_v, *part)
    return into_q, into_k, into_v


@back.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    mass: Tensor,
    layout: Tensors,
    kinds: Sequence[int],
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    into_q, into_k, into_v = (x.new_empty(x.shape, dtype=summed(x)) for x in (q, k, v))
    return into_q, into_k, into_v


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, layout, ctx.kinds, ctx.shift = inputs
    out, top, mass, met, again = output
    ctx.mark_non_differentiable(top, mass, met, again)
    ctx.save_for_backward(q, k, v, out, top, mass, *layout)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, out, top, mass, *layout = ctx.saved_tensors
    into = back(grad, q, k, v, out, top, mass, layout, ctx.kinds, ctx.shift)
    return *(x.to(q.dtype) for x in into), [None] * len(layout), None, None


merged.register_autograd(_backward, setup_context=_setup)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensors, kinds: Sequence[int], shift: int
) -> Iterable[tuple[Tensor | int | None, ...]]:
    """Yield what the library wants to know of each part."""
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    for i in range(len(kinds) // 2):
        token_q, token_k, of_tile, of_query, of_key = (x.contiguous() for x in layout[5 * i : 5 * i + 5])
        causal, times = kinds[2 * i : 2 * i + 2]
        sizes = *token_q.shape[1:], *token_k.shape[1:], len(of_query)
        tiles = of_tile if of_tile.numel() else None
        yield token_q, token_k, tiles, of_query, of_key, g, n, m, d, dv, *sizes, causal, shift, times
