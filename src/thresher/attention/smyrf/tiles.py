"""Softmax attention inside tiles of queries and their keys, merged by log-sum-exp.

Let lse_i be the log-sum-exp of a query's scores in its i-th tile. The share of this tile is s_i = exp(lse_i) / sum_j
exp(lse_j), and the merged output is out = sum_i s_i out_i. If weights_i are the weights inside the tile, the weights
over all keys are s_i weights_i, and dL/dscore = s_i weights_i (g.v - g.out). A backward pass of the tile, PyTorch's
fused one included, therefore computes the merged gradient if it receives out in place of out_i and s_i g in place of g.

The keys that a row drops may take part in the merge: they act as a tile with weights of their own, the tail.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.attention.shared.functional import MAX_EXCESS, drop_weights
from thresher.attention.smyrf.layout import Layout, find_unplaced, gather_slots, sum_slots

TensorTriple = tuple[Tensor, Tensor, Tensor]


class Tiles(NamedTuple):
    """Tiles of queries and the clusters of keys that they attend to.

    Attributes:
        queries: Layout of queries in adjacent tiles of equal size.
        keys: Layout of keys in adjacent clusters of equal size.
        tile_cluster: Cluster that each tile attends to, ascending; None means one tile for each cluster.
        shown: Visible pairs of each tile; None means all.
        drop: Weights that dropout keeps; None means all.
        clusters: Number of clusters.
        times: Weight of each meeting of a query with a key.
    """

    queries: Layout
    keys: Layout
    tile_cluster: Int[Tensor, "g tiles"] | None
    shown: Bool[Tensor, "g tiles #s c"] | None
    drop: Bool[Tensor, "g tiles s c"] | None
    clusters: int
    times: int


class Dropped(NamedTuple):
    """The keys that each row drops, all of equal weight.

    Attributes:
        score: Their mean score, which all of them get.
        mass: Their number times the factor of the tail; 0 where a row drops nothing.
        value: The mean of their values.
    """

    score: Float[Tensor, "g n"]
    mass: Float[Tensor, "g n"]
    value: Float[Tensor, "g n dv"]


def find_tile_queries(tiles: Tiles) -> Int[Tensor, "g tiles s"]:
    """Find the query in each slot of each tile."""
    number = tiles.clusters if tiles.tile_cluster is None else tiles.tile_cluster.shape[1]
    return tiles.queries.token.unflatten(1, (number, -1))


def find_tile_keys(tiles: Tiles) -> Int[Tensor, "g tiles c"]:
    """Find the keys that each tile attends to."""
    clusters = tiles.keys.token.unflatten(1, (tiles.clusters, -1))
    if tiles.tile_cluster is None:
        return clusters
    return clusters.gather(1, tiles.tile_cluster[..., None].expand(-1, -1, clusters.shape[2]))


def attend_in_tiles(
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g m d"],
    v: Float[Tensor, "g m dv"],
    parts: Sequence[Tiles],
    extras: Sequence[Tensor | None],
    dropped: Dropped | None = None,
    *,
    dropout: float = 0.0,
    fused: bool = True,
) -> Float[Tensor, "g n dv"]:
    """Attend inside the tiles of all parts and merge the results; a query without keys gets zero.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        parts: Tiles; those of one part have equal size.
        extras: Addends to the scores of each part.
        dropped: The keys that each row drops; None gives them no weight. Dropout leaves their weight as it is.
        dropout: Probability of dropping a weight, with which `Tiles.drop` was drawn.
        fused: Use PyTorch's fused attention, where it exists; every query in a tile must see one of its keys.
    """
    fused = fused and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    fused = fused and all(extra is None and part.drop is None for part, extra in zip(parts, extras, strict=True))
    return _MergedAttention.apply(q, k, v, parts, dropout, fused, *extras, *(dropped or ()))


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
        *extras_and_dropped: Tensor | None,
    ) -> Tensor:
        extras, given = extras_and_dropped[: len(parts)], extras_and_dropped[len(parts) :]
        dropped = Dropped(*given) if given else None  # type: ignore[arg-type]
        outs, tops, masses, levels = [], [], [], []
        for part, extra in zip(parts, extras, strict=True):
            tiles = _gather_tiles(q, k, v, part)
            out, top, mass = _attend_fused(*tiles, part.shown) if fused else _attend_plain(*tiles, part, extra, dropout)
            levels.append(top if fused else None)
            slot, none = part.queries.slot, find_unplaced(part.queries)
            top, mass = (x.flatten(1).expand(len(slot), -1, -1) for x in (top, mass))
            top, mass = (x.gather(-1, slot.clamp_max(x.shape[-1] - 1)) for x in (top, mass))
            tops.append(top.masked_fill(none, float("-inf")))
            masses.append(mass * part.times)
            outs.append(out.flatten(1, 2))
        shares, unit = _compute_shares(tops, masses, dropped)
        out = _sum_in_place(
            sum_slots(out, part.queries, share) for out, part, share in zip(outs, parts, shares, strict=True)
        )
        of_dropped: tuple[Tensor, ...] = ()
        if dropped is not None and unit is not None:
            out += (unit * dropped.mass)[..., None] * dropped.value
            of_dropped = unit, dropped.mass, dropped.value
        ctx.clusters_and_times = [(part.clusters, part.times) for part in parts]
        ctx.dropout, ctx.fused = dropout, fused
        tensors = (x for part in parts for x in _list_tensors(part))
        ctx.save_for_backward(q, k, v, out, *shares, *levels, *extras, *tensors, *of_dropped)
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
            tile_cluster, shown, drop = tensors[4:]
            part = Tiles(queries, keys, tile_cluster, shown, drop, clusters, times)
            token = find_tile_queries(part)
            tiles = _gather_tiles(q, k, v, part)
            shared = _gather(grad, token) * _gather_shares(share, token)[..., None], _gather(out, token)
            through = None
            if ctx.fused:
                found = _attend_fused_backward(*shared, level, *tiles, part.shown)
            else:
                found, through = _attend_plain_backward(*shared, *tiles, part, extra, ctx.dropout)
            grads = _sum_tiles(*found, part)
            total = [_sum_in_place(pair) for pair in zip(total, grads, strict=True)] if total else list(grads)
            into_extras.append(through if ctx.needs_input_grad[6 + i] else None)
        into_dropped: tuple[Tensor, ...] = ()
        if of_dropped := rest[10 * number :]:
            unit, mass, value = of_dropped
            into_mass = unit * (grad * (value - out)).sum(-1)
            into_dropped = into_mass * mass, into_mass, (unit * mass)[..., None] * grad
        return *total, None, None, None, *into_extras, *into_dropped


def _compute_shares(
    tops: Sequence[Tensor], masses: Sequence[Tensor], dropped: Dropped | None
) -> tuple[list[Tensor], Tensor | None]:
    """Compute the share of each round in the merged output, [r, g, n] a part, from log-sum-exp = top + log(mass).

    Return them with the share of one unit of the dropped keys' mass. `weigh_with_tail` clamps their score likewise.
    """
    top = torch.cat(list(tops)).amax(0)
    if dropped is not None:
        top = torch.where(top == float("-inf"), dropped.score, top)
    top = top.masked_fill(top == float("-inf"), 0)
    shares = [mass * (each - top).exp() for each, mass in zip(tops, masses, strict=True)]
    total, unit = torch.cat(shares).sum(0), None
    if dropped is not None:
        unit = (dropped.score - top).clamp_max(MAX_EXCESS).exp()
        total = total + unit * dropped.mass
    total = total.masked_fill(total == 0, 1)
    return [share / total for share in shares], None if unit is None else unit / total


def _gather_shares(share: Float[Tensor, "r g n"], token: Int[Tensor, "g tiles s"]) -> Float[Tensor, "g tiles s"]:
    """Gather the share of the query in each slot; 0 where the slot is empty."""
    of_round = token.unflatten(1, (len(share), -1)).flatten(2)
    found = share.transpose(0, 1).gather(-1, of_round.clamp_max(share.shape[-1] - 1))
    return found.masked_fill(of_round == share.shape[-1], 0).view(token.shape)


def _sum_in_place(each: Iterable[Tensor]) -> Tensor:
    """Sum tensors into the first, so that at most two are in memory."""
    return reduce(Tensor.add_, each)


def _gather(x: Tensor, token: Tensor) -> Tensor:
    return gather_slots(x, token.flatten(1)).view(*token.shape, -1)


def _list_tensors(part: Tiles) -> tuple[Tensor | None, ...]:
    return (*part.queries, *part.keys, part.tile_cluster, part.shown, part.drop)


def _gather_tiles(q: Tensor, k: Tensor, v: Tensor, part: Tiles) -> TensorTriple:
    token_k = find_tile_keys(part)
    return _gather(q, find_tile_queries(part)), _gather(k, token_k), _gather(v, token_k)


def _sum_tiles(into_q: Tensor, into_k: Tensor, into_v: Tensor, part: Tiles) -> TensorTriple:
    """Sum the gradients of tiles for each token."""
    if part.tile_cluster is not None:
        g, tiles = part.tile_cluster.shape
        of = (part.tile_cluster + torch.arange(g, device=into_q.device)[:, None] * part.clusters).flatten()
        start = torch.searchsorted(of, torch.arange(g * part.clusters, device=of.device))
        every = torch.arange(g * tiles, device=of.device)
        into_k, into_v = (
            F.embedding_bag(every, x.reshape(g * tiles, -1), start, mode="sum").view(g, -1, *x.shape[2:])
            for x in (into_k, into_v)
        )
    return (
        sum_slots(into_q.flatten(1, 2), part.queries),
        sum_slots(into_k.flatten(1, 2), part.keys),
        sum_slots(into_v.flatten(1, 2), part.keys),
    )


def _compute_scores(q: Tensor, k: Tensor, part: Tiles, extra: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if extra is not None:
        scores += extra
    return scores if part.shown is None else scores.masked_fill_(~part.shown, torch.finfo(q.dtype).min)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, part: Tiles, extra: Tensor | None, dropout: float) -> TensorTriple:
    """Attend inside tiles; return outputs, best scores and the sums of exp(score - best)."""
    scores = _compute_scores(q, k, part, extra)
    weights = scores.softmax(-1)
    top = scores.amax(-1)
    top = top.masked_fill(top <= torch.finfo(q.dtype).min / 2, float("-inf"))
    return drop_weights(weights, part.drop, dropout) @ v, top, 1 / weights.amax(-1)


def _attend_plain_backward(
    grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, part: Tiles, extra: Tensor | None, dropout: float
) -> tuple[TensorTriple, Tensor]:
    empty = find_tile_queries(part) == part.queries.slot.shape[-1]
    weights = _compute_scores(q, k, part, extra).softmax(-1).masked_fill_(empty[..., None], 0)
    through = drop_weights(grad @ v.mT, part.drop, dropout) - (grad * out).sum(-1, keepdim=True)
    through *= weights
    scale = q.shape[-1] ** -0.5
    into_v = drop_weights(weights, part.drop, dropout).mT @ grad
    return ((through @ k) * scale, (through.mT @ q) * scale, into_v), through


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None) -> TensorTriple:
    """Attend with PyTorch's fused attention; return outputs, log-sum-exps as tops, and masses of 1."""
    tiles = (x.flatten(0, 1)[:, None] for x in (q, k, v))
    out, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *tiles, attn_mask=_convert_to_bias(shown, q)
    )
    level = level.view(q.shape[:-1])
    return out.view_as(q), level, torch.ones_like(level)


def _attend_fused_backward(
    grad: Tensor, out: Tensor, level: Tensor, q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None
) -> TensorTriple:
    inputs = (x.flatten(0, 1)[:, None] for x in (grad, q, k, v, out, level))
    into_q, into_k, into_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *inputs, 0.0, False, attn_mask=_convert_to_bias(shown, q)
    )
    return into_q.reshape(q.shape), into_k.reshape(k.shape), into_v.reshape(v.shape)


def _convert_to_bias(shown: Tensor | None, like: Tensor) -> Tensor | None:
    if shown is None:
        return None
    return like.new_zeros(shown.shape).masked_fill_(~shown, float("-inf")).flatten(0, 1)[:, None]
