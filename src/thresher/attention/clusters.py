"""Clusters of queries and keys, as SMYRF forms them: hash tokens, sort them by hash value, cut them into parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.layout import Layout, layout_of, rank_of

Rank = Callable[[Tensor], Tensor]  # as rank_of does; a kernel may be faster


class Directions(NamedTuple):
    """Random directions for d + 2 dimensions and shifts, one for each round; a width rounds hash values down.

    With |q|^2 and |k|^2 at most M^2, F(q) = [q, 0, sqrt(M^2 - |q|^2)] and G(k) = [k, sqrt(M^2 - |k|^2), 0] have equal
    norms and F.G = q.k: a hash value is the component of F(q) or G(k) in a direction.
    """

    of_round: Float[Tensor, "r d2"]
    shifts: Float[Tensor, " r"]
    width: float | None


def project(x: Float[Tensor, "g n d"], directions: Directions) -> Float[Tensor, "r g n"]:
    """Return what the d dimensions of tokens contribute to their hash values."""
    return (directions.of_round[:, :-2].to(x.dtype) @ x.mT).transpose(0, 1)


def hash_queries(projected: Tensor, rest: Tensor, directions: Directions) -> Tensor:
    """Add to projected queries sqrt(M^2 - |q|^2) in their own dimension."""
    return _hash(projected, rest, directions, -1)


def hash_keys(projected: Tensor, rest: Tensor, directions: Directions) -> Tensor:
    """Add to projected keys sqrt(M^2 - |k|^2) in their own dimension."""
    return _hash(projected, rest, directions, -2)


def _hash(projected: Tensor, rest: Tensor, directions: Directions, column: int) -> Tensor:
    each = (-1, *[1] * (projected.ndim - 1))
    values = projected + rest * directions.of_round[:, column].to(projected.dtype).view(each)
    if directions.width is not None:
        shift = (directions.shifts * directions.width).to(values.dtype).view(each)
        values = ((values + shift) / directions.width).floor()
    # nan would sort behind the tokens that are hidden; it still reaches the scores.
    return values.nan_to_num()


class Clusters(NamedTuple):
    """An assignment of queries and keys to clusters in several rounds.

    Attributes:
        of_query: Cluster of each query among those of all rounds; -1 where it has none.
        of_key: Cluster of each key among those of all rounds; -2 where it has none.
        of_tile: Cluster that each tile of queries attends to; None is one tile for each cluster.
        queries: Where queries go: tiles of equal size, each inside one cluster.
        keys: Where keys go: clusters of equal size.
        number: Number of clusters in all rounds.
        full: Whether every slot of a key that some query meets is taken.
        present: Whether clusters are blocks of the sequence, in which keys after a query are to be hidden from it.
    """

    of_query: Int[Tensor, "r g n"]
    of_key: Int[Tensor, "r g m"]
    of_tile: Int[Tensor, "g tiles"] | None
    queries: Layout
    keys: Layout
    number: int
    full: bool
    present: bool = False


def hash_tokens(
    q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"], directions: Directions, *, apart: bool
) -> tuple[Float[Tensor, "r g n"], Float[Tensor, "r g m"]]:
    """Hash queries and keys with M^2 = max |q|^2 + max |k|^2.

    Apart: M^2 = max |k|^2, and q is scaled to that length, so that no query depends on another.
    """
    norm_q, norm_k = (torch.linalg.vector_norm(x, dim=-1) for x in (q, k))
    largest = norm_k.amax(-1, keepdim=True).square()
    projected = project(q, directions)
    if apart:
        projected = projected * (largest.sqrt() / norm_q.clamp_min(1e-12))
        rest_q = torch.zeros_like(norm_q)
    else:
        largest = largest + norm_q.amax(-1, keepdim=True).square()
        rest_q = (largest - norm_q.square()).clamp_min(0).sqrt()
    rest_k = (largest - norm_k.square()).clamp_min(0).sqrt()
    return hash_queries(projected, rest_q, directions), hash_keys(project(k, directions), rest_k, directions)


def cluster_tokens(
    hash_q: Float[Tensor, "r g n"],
    hash_k: Float[Tensor, "r g m"],
    seen_q: Bool[Tensor, "g n"] | None,
    seen_k: Bool[Tensor, "g m"] | None,
    cluster: int,
    *,
    apart: bool,
    alike: bool,
    rank: Rank = rank_of,
) -> Clusters:
    """Cut tokens into clusters of about `cluster` keys; hidden tokens belong to none.

    Args:
        hash_q: Hash values of queries, one for each round.
        hash_k: Hash values of keys.
        seen_q: Queries that are not hidden, if any are.
        seen_k: Keys that are not hidden, if any are.
        cluster: Largest number of keys in a cluster.
        apart: Place each query by its own value between the keys, in place of ranking queries together.
        alike: As many queries are seen as keys, or all keys are seen.
        rank: What sorts hash values.
    """
    n, m = hash_q.shape[-1], hash_k.shape[-1]
    number = -(-m // cluster)
    count: Tensor | int = m
    clusters: Tensor | int = number
    size = -(-m // number)
    if seen_k is not None:
        count = seen_k.sum(-1, keepdim=True).clamp_min(1)
        clusters, size = -(-count // cluster), cluster
    of_key, slot_k = _cut(hash_k, seen_k, clusters, size, rank)
    if alike and not apart:
        tile, of_tile = size if n == m else -(-n // number), None
        of_query, slot_q = _cut(hash_q, seen_q, clusters, tile, rank)
    else:
        if apart:
            of_query = _place(hash_q, _hide(hash_k, seen_k), clusters, count, number)
        else:
            of_query, _ = _cut(hash_q, seen_q, clusters, 1, rank)
        tile = -(-n // number)
        of_tile, slot_q = lay_out(_hide(of_query, seen_q, number), number, tile, most=n)
    return assemble(of_query, of_key, of_tile, slot_q, slot_k, seen_q, seen_k, (number, tile, size))


def assemble(
    of_query: Int[Tensor, "r g n"],
    of_key: Int[Tensor, "r g m"],
    of_tile: Int[Tensor, "r g tiles"] | None,
    slot_q: Int[Tensor, "r g n"],
    slot_k: Int[Tensor, "r g m"],
    placed_q: Bool[Tensor, "g n"] | None,
    placed_k: Bool[Tensor, "g m"] | None,
    sizes: tuple[int, int, int],
) -> Clusters:
    """Number the clusters and slots of all rounds one round after the other; tokens that are not placed have none.

    Sizes are the number of clusters in a round, of queries in a tile and of keys in a cluster.
    """
    number, tile, size = sizes
    rounds, _, m = of_key.shape
    tiles = number if of_tile is None else of_tile.shape[-1]
    slots_q, slots_k = rounds * tiles * tile, rounds * number * size
    return Clusters(
        of_query=_in_a_row(of_query, number, placed_q, -1),
        of_key=_in_a_row(of_key, number, placed_k, -2),
        of_tile=None if of_tile is None else _in_a_row(of_tile, number).transpose(0, 1).flatten(1),
        queries=layout_of(_in_a_row(slot_q, tiles * tile, placed_q, slots_q), slots_q),
        keys=layout_of(_in_a_row(slot_k, number * size, placed_k, slots_k), slots_k),
        number=rounds * number,
        full=placed_k is None and m == number * size,
    )


def lay_out(
    of_query: Int[Tensor, "r g n"], number: int, tile: int, most: int
) -> tuple[Int[Tensor, "r g tiles"], Int[Tensor, "r g n"]]:
    """Lay queries out in tiles, each inside one cluster; return the cluster of each tile and the slots of queries.

    A cluster may hold any number of queries: the static bound is one partly filled tile for each cluster.

    Args:
        of_query: Cluster of each query; `number` where it has none, which leaves the slot undefined.
        number: Number of clusters.
        tile: Number of queries in a tile.
        most: Largest number of queries that have a cluster.
    """
    tiles = (most + number * (tile - 1)) // tile
    count = of_query.new_zeros(*of_query.shape[:2], number + 1).scatter_add_(-1, of_query, torch.ones_like(of_query))
    filled = -(-count[..., :number] // tile)
    last = filled.cumsum(-1)
    # A query's rank among all, less that of the first in its cluster, is its place in the cluster.
    start = F.pad(last - filled, (0, 1)) * tile - count.cumsum(-1) + count
    slot = start.gather(-1, of_query) + rank_of(of_query)
    each = torch.arange(tiles, device=of_query.device).expand(*of_query.shape[:2], -1).contiguous()
    return torch.searchsorted(last, each, right=True).clamp_max(number - 1), slot


def _cut(
    values: Float[Tensor, "r g n"], seen: Bool[Tensor, "g n"] | None, clusters: Tensor | int, size: int, rank: Rank
) -> tuple[Int[Tensor, "r g n"], Int[Tensor, "r g n"]]:
    """Cut tokens in the order of their values into clusters that differ by one at most; return cluster and slot."""
    count = values.shape[-1] if seen is None else seen.sum(-1, keepdim=True).clamp_min(1)
    place = rank(_hide(values, seen))
    of = place * clusters // count
    return of, of * size + place + (-of * count) // clusters


def _place(
    hash_q: Tensor, hash_k: Tensor, clusters: Tensor | int, count: Tensor | int, number: int
) -> Int[Tensor, "r g n"]:
    """Return the cluster of each query by boundaries halfway between the keys of neighbouring clusters."""
    ordered = hash_k.sort(dim=-1).values
    cluster = torch.arange(1, number, device=hash_q.device)
    first = (-((-cluster * count) // clusters)).expand(*hash_k.shape[:2], -1)
    above, below = (ordered.gather(-1, x.clamp_max(ordered.shape[-1] - 1)) for x in (first, first - 1))
    boundary = ((above + below) / 2).masked_fill(cluster >= clusters, float("inf"))
    placed = torch.searchsorted(boundary, hash_q.contiguous(), right=True)
    return placed.clamp_max(clusters - 1) if isinstance(clusters, int) else placed.minimum(clusters - 1)


def _hide(x: Tensor, seen: Tensor | None, value: float | int = float("inf")) -> Tensor:
    return x if seen is None else x.masked_fill(~seen, value)


def _in_a_row(x: Int[Tensor, "r g n"], size: int, placed: Tensor | None = None, none: int = 0) -> Tensor:
    x = x + torch.arange(len(x), device=x.device)[:, None, None] * size
    return x if placed is None else x.masked_fill(~placed, none)
