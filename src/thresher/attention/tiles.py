"""Softmax attention inside tiles, a few queries and the keys that they meet, merged by log-sum-exp.

With lse_i of the keys that a query meets in its i-th tile, its share is s_i = exp(lse_i) / sum_j exp(lse_j), and merged
outputs are out = sum_i s_i out_i. Where weights_i are those of its tile alone, those over all keys at once are
s_i weights_i, and dL/dscore = s_i weights_i (g.v - g.out). A backward pass that is told out in place of that of its
tile, and s_i g in place of g, therefore finds the merged gradient, PyTorch's fused one included.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.attention.functional import drop_weights
from thresher.attention.layout import Layout, from_slots, to_slots, unplaced

Three = tuple[Tensor, Tensor, Tensor]


class Tiles(NamedTuple):
    """Which queries meet which keys.

    Attributes:
        queries: Where queries go; tiles of equal size lie side by side.
        keys: Where keys go; clusters of equal size lie side by side.
        of_tile: Cluster that each tile attends to, in ascending order; None is one tile for each cluster.
        shown: Which pairs of a tile are visible; None is all.
        drop: Which weights dropout keeps.
        clusters: Number of clusters.
        times: How often each meeting counts.
    """

    queries: Layout
    keys: Layout
    of_tile: Int[Tensor, "g tiles"] | None
    shown: Bool[Tensor, "g tiles #s c"] | None
    drop: Bool[Tensor, "g tiles s c"] | None
    clusters: int
    times: int


def queries_of(tiles: Tiles) -> Int[Tensor, "g tiles s"]:
    """Return the query in each slot of each tile."""
    number = tiles.clusters if tiles.of_tile is None else tiles.of_tile.shape[1]
    return tiles.queries.token.unflatten(1, (number, -1))


def keys_of(tiles: Tiles) -> Int[Tensor, "g tiles c"]:
    """Return the keys that each tile attends to."""
    clusters = tiles.keys.token.unflatten(1, (tiles.clusters, -1))
    if tiles.of_tile is None:
        return clusters
    return clusters.gather(1, tiles.of_tile[..., None].expand(-1, -1, clusters.shape[2]))


def attend_in_tiles(
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g m d"],
    v: Float[Tensor, "g m dv"],
    parts: Sequence[Tiles],
    extras: Sequence[Tensor | None],
    *,
    dropout: float = 0.0,
    fused: bool = True,
) -> Float[Tensor, "g n dv"]:
    """Attend inside the tiles of all parts and merge them; a query that meets nothing gets zero.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        parts: Which queries meet which keys; tiles of one part have one size.
        extras: What is added to the scores of each part.
        dropout: The probability with which `Tiles.drop` was drawn.
        fused: Use PyTorch's fused attention, where it exists; every query in a tile must see one of its keys.
    """
    fused = fused and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    fused = fused and all(extra is None and part.drop is None for part, extra in zip(parts, extras, strict=True))
    return _MergedAttention.apply(q, k, v, parts, dropout, fused, *extras)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        parts: Sequence[Tiles],
        dropout: float,
        fused: bool,
        *extras: Tensor | None,
    ) -> Tensor:
        outs, tops, masses, of_tiles = [], [], [], []
        for part, extra in zip(parts, extras, strict=True):
            tiles = _in_tiles(q, k, v, part)
            out, top, mass = _fused(*tiles, part.shown) if fused else _plain(*tiles, part, extra, dropout)
            of_tiles.append(top if fused else None)
            slot, none = part.queries.slot, unplaced(part.queries)
            top, mass = (x.flatten(1).expand(len(slot), -1, -1) for x in (top, mass))
            top, mass = (x.gather(-1, slot.clamp_max(x.shape[-1] - 1)) for x in (top, mass))
            tops.append(top.masked_fill(none, float("-inf")))
            masses.append(mass * part.times)
            outs.append(out.flatten(1, 2))
        shares = _shares(tops, masses)
        out = _sum(from_slots(out, part.queries, share) for out, part, share in zip(outs, parts, shares, strict=True))
        ctx.clusters_and_times = [(part.clusters, part.times) for part in parts]
        ctx.dropout, ctx.fused = dropout, fused
        tensors = (x for part in parts for x in _tensors_of(part))
        ctx.save_for_backward(q, k, v, out, *shares, *of_tiles, *extras, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *rest = ctx.saved_tensors
        number = len(ctx.clusters_and_times)
        total: list[Tensor] = []
        into_extras: list[Tensor | None] = []
        for i, (clusters, times) in enumerate(ctx.clusters_and_times):
            share, level, extra = rest[i], rest[number + i], rest[2 * number + i]
            tensors = rest[3 * number + 7 * i : 3 * number + 7 * (i + 1)]
            queries, keys = Layout(*tensors[:2]), Layout(*tensors[2:4])
            of_tile, shown, drop = tensors[4:]
            part = Tiles(queries, keys, of_tile, shown, drop, clusters, times)
            token = queries_of(part)
            tiles = _in_tiles(q, k, v, part)
            shared = _gather(grad, token) * _of_slots(share, token)[..., None], _gather(out, token)
            through = None
            if ctx.fused:
                found = _fused_backward(*shared, level, *tiles, part.shown)
            else:
                found, through = _plain_backward(*shared, *tiles, part, extra, ctx.dropout)
            grads = _from_tiles(*found, part)
            total = [_sum(pair) for pair in zip(total, grads, strict=True)] if total else list(grads)
            into_extras.append(through if ctx.needs_input_grad[6 + i] else None)
        return *total, None, None, None, *into_extras


def _shares(tops: Sequence[Tensor], masses: Sequence[Tensor]) -> list[Tensor]:
    """Return what each round of each part counts for each query, [r, g, n], from log-sum-exps as top + log(mass)."""
    top = torch.cat(list(tops)).amax(0)
    top = top.masked_fill(top == float("-inf"), 0)
    shares = [mass * (each - top).exp() for each, mass in zip(tops, masses, strict=True)]
    total = torch.cat(shares).sum(0)
    return [share / total.masked_fill(total == 0, 1) for share in shares]


def _of_slots(share: Float[Tensor, "r g n"], token: Int[Tensor, "g tiles s"]) -> Float[Tensor, "g tiles s"]:
    """Return the share of the query in each slot; none where there is no query."""
    of_round = token.unflatten(1, (len(share), -1)).flatten(2)
    found = share.transpose(0, 1).gather(-1, of_round.clamp_max(share.shape[-1] - 1))
    return found.masked_fill(of_round == share.shape[-1], 0).view(token.shape)


def _sum(each: Iterable[Tensor]) -> Tensor:
    """Add everything to the first, so that there is never more than one beside it."""
    return reduce(Tensor.add_, each)


def _gather(x: Tensor, token: Tensor) -> Tensor:
    return to_slots(x, token.flatten(1)).view(*token.shape, -1)


def _tensors_of(part: Tiles) -> tuple[Tensor | None, ...]:
    return (*part.queries, *part.keys, part.of_tile, part.shown, part.drop)


def _in_tiles(q: Tensor, k: Tensor, v: Tensor, part: Tiles) -> Three:
    token_k = keys_of(part)
    return _gather(q, queries_of(part)), _gather(k, token_k), _gather(v, token_k)


def _from_tiles(into_q: Tensor, into_k: Tensor, into_v: Tensor, part: Tiles) -> Three:
    """Sum up gradients of tiles for each token."""
    if part.of_tile is not None:
        g, tiles = part.of_tile.shape
        of = (part.of_tile + torch.arange(g, device=into_q.device)[:, None] * part.clusters).flatten()
        start = torch.searchsorted(of, torch.arange(g * part.clusters, device=of.device))
        every = torch.arange(g * tiles, device=of.device)
        into_k, into_v = (
            F.embedding_bag(every, x.reshape(g * tiles, -1), start, mode="sum").view(g, -1, *x.shape[2:])
            for x in (into_k, into_v)
        )
    return (
        from_slots(into_q.flatten(1, 2), part.queries),
        from_slots(into_k.flatten(1, 2), part.keys),
        from_slots(into_v.flatten(1, 2), part.keys),
    )


def _scores(q: Tensor, k: Tensor, part: Tiles, extra: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if extra is not None:
        scores += extra
    return scores if part.shown is None else scores.masked_fill_(~part.shown, torch.finfo(q.dtype).min)


def _plain(q: Tensor, k: Tensor, v: Tensor, part: Tiles, extra: Tensor | None, dropout: float) -> Three:
    """Return the output of each tile, its best scores, and the sum of exp(score - best): huge scores lose its log."""
    scores = _scores(q, k, part, extra)
    weights = scores.softmax(-1)
    top = scores.amax(-1)
    top = top.masked_fill(top <= torch.finfo(q.dtype).min / 2, float("-inf"))
    return drop_weights(weights, part.drop, dropout) @ v, top, 1 / weights.amax(-1)


def _plain_backward(
    grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, part: Tiles, extra: Tensor | None, dropout: float
) -> tuple[Three, Tensor]:
    empty = queries_of(part) == part.queries.slot.shape[-1]
    weights = _scores(q, k, part, extra).softmax(-1).masked_fill_(empty[..., None], 0)
    through = drop_weights(grad @ v.mT, part.drop, dropout) - (grad * out).sum(-1, keepdim=True)
    through *= weights
    scale = q.shape[-1] ** -0.5
    into_v = drop_weights(weights, part.drop, dropout).mT @ grad
    return ((through @ k) * scale, (through.mT @ q) * scale, into_v), through


def _fused(q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None) -> Three:
    """Do what `_plain` does in PyTorch's fused attention; its log-sum-exp is all that is known of tops and masses."""
    tiles = (x.flatten(0, 1)[:, None] for x in (q, k, v))
    out, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tiles, attn_mask=_as_bias(shown, q))
    level = level.view(q.shape[:-1])
    return out.view_as(q), level, torch.ones_like(level)


def _fused_backward(
    grad: Tensor, out: Tensor, level: Tensor, q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None
) -> Three:
    inputs = (x.flatten(0, 1)[:, None] for x in (grad, q, k, v, out, level))
    into_q, into_k, into_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *inputs, 0.0, False, attn_mask=_as_bias(shown, q)
    )
    return into_q.reshape(q.shape), into_k.reshape(k.shape), into_v.reshape(v.shape)


def _as_bias(shown: Tensor | None, like: Tensor) -> Tensor | None:
    if shown is None:
        return None
    return like.new_zeros(shown.shape).masked_fill_(~shown, float("-inf")).flatten(0, 1)[:, None]
