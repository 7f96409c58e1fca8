"""Clusters of queries and keys: hash tokens, sort them by hash value, cut them into parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.smyrf.layout import Layout, build_layout, compute_ranks

Rank = Callable[[Tensor], Tensor]  # `compute_ranks` or a faster kernel


class Directions(NamedTuple):
    """Random directions of d + 2 dimensions and shifts for each round; `width` rounds hash values down.

    With |q|^2 and |k|^2 at most M^2, F(q) = [q, 0, sqrt(M^2 - |q|^2)] and G(k) = [k, sqrt(M^2 - |k|^2), 0] have equal
    norms and F.G = q.k. A hash value is the component of F(q) or G(k) in a direction.
    """

    vectors: Float[Tensor, "r d2"]
    shifts: Float[Tensor, " r"]
    width: float | None


def project(x: Float[Tensor, "g n d"], directions: Directions) -> Float[Tensor, "r g n"]:
    """Project tokens: the part of hash values that the d dimensions contribute."""
    return (directions.vectors[:, :-2].to(x.dtype) @ x.mT).transpose(0, 1)


def hash_queries(projected: Tensor, rest: Tensor, directions: Directions) -> Tensor:
    """Complete the hash values of queries with sqrt(M^2 - |q|^2) in the last dimension."""
    return _hash(projected, rest, directions, -1)


def hash_keys(projected: Tensor, rest: Tensor, directions: Directions) -> Tensor:
    """Complete the hash values of keys with sqrt(M^2 - |k|^2) in the last dimension but one."""
    return _hash(projected, rest, directions, -2)


def _hash(projected: Tensor, rest: Tensor, directions: Directions, column: int) -> Tensor:
    each = (-1, *[1] * (projected.ndim - 1))
    values = projected + rest * directions.vectors[:, column].to(projected.dtype).view(each)
    if directions.width is not None:
        shift = (directions.shifts * directions.width).to(values.dtype).view(each)
        values = ((values + shift) / directions.width).floor()
    # NaN would sort behind hidden tokens; it still reaches the scores.
    return values.nan_to_num()


class Clusters(NamedTuple):
    """An assignment of queries and keys to clusters in several rounds.

    Attributes:
        query_cluster: Cluster of each query, numbered across rounds; -1 where it has none.
        key_cluster: Cluster of each key, numbered across rounds; -2 where it has none.
        tile_cluster: Cluster that each tile of queries attends to; None means one tile for each cluster.
        queries: Layout of queries in tiles of equal size, each inside one cluster.
        keys: Layout of keys in clusters of equal size.
        number: Number of clusters in all rounds.
        filled: Whether no cluster that a query attends to has an empty slot.
        causal: Whether clusters are blocks of the sequence, in which keys after a query are hidden from it.
    """

    query_cluster: Int[Tensor, "r g n"]
    key_cluster: Int[Tensor, "r g m"]
    tile_cluster: Int[Tensor, "g tiles"] | None
    queries: Layout
    keys: Layout
    number: int
    filled: bool
    causal: bool = False


def hash_tokens(
    q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"], directions: Directions, *, independent_queries: bool
) -> tuple[Float[Tensor, "r g n"], Float[Tensor, "r g m"]]:
    """Hash queries and keys with M^2 = max |q|^2 + max |k|^2.

    With independent queries M^2 = max |k|^2, and q is scaled to that length, so no query depends on another.
    """
    norm_q, norm_k = (torch.linalg.vector_norm(x, dim=-1) for x in (q, k))
    largest = norm_k.amax(-1, keepdim=True).square()
    projected = project(q, directions)
    if independent_queries:
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
    independent_queries: bool,
    aligned: bool,
    rank: Rank = compute_ranks,
) -> Clusters:
    """Cut tokens into clusters of about `cluster` keys; hidden tokens belong to none.

    Args:
        hash_q: Hash values of queries, one for each round.
        hash_k: Hash values of keys.
        seen_q: Queries that are not hidden; None means all.
        seen_k: Keys that are not hidden; None means all.
        cluster: Largest number of keys in a cluster.
        independent_queries: Place each query among the keys by its own hash value instead of ranking all queries.
        aligned: Whether equal numbers of queries and keys are visible, or all keys are.
        rank: Function that ranks hash values.
    """
    n, m = hash_q.shape[-1], hash_k.shape[-1]
    number = -(-m // cluster)
    count: Tensor | int = m
    clusters: Tensor | int = number
    size = -(-m // number)
    if seen_k is not None:
        count = seen_k.sum(-1, keepdim=True).clamp_min(1)
        clusters, size = -(-count // cluster), cluster
    key_cluster, slot_k = _cut(hash_k, seen_k, clusters, size, rank)
    if aligned and not independent_queries:
        tile, tile_cluster = size if n == m else -(-n // number), None
        query_cluster, slot_q = _cut(hash_q, seen_q, clusters, tile, rank)
    else:
        if independent_queries:
            query_cluster = _place(hash_q, _hide(hash_k, seen_k), clusters, count, number)
        else:
            query_cluster, _ = _cut(hash_q, seen_q, clusters, 1, rank)
        tile = -(-n // number)
        tile_cluster, slot_q = lay_out(_hide(query_cluster, seen_q, number), number, tile, most=n)
    return assemble(query_cluster, key_cluster, tile_cluster, slot_q, slot_k, seen_q, seen_k, (number, tile, size))


def assemble(
    query_cluster: Int[Tensor, "r g n"],
    key_cluster: Int[Tensor, "r g m"],
    tile_cluster: Int[Tensor, "r g tiles"] | None,
    slot_q: Int[Tensor, "r g n"],
    slot_k: Int[Tensor, "r g m"],
    placed_q: Bool[Tensor, "g n"] | None,
    placed_k: Bool[Tensor, "g m"] | None,
    sizes: tuple[int, int, int],
) -> Clusters:
    """Assemble the rounds: number clusters and slots across rounds; tokens that are not placed get none.

    `sizes` are the numbers of clusters in a round, of queries in a tile and of keys in a cluster.
    """
    number, tile, size = sizes
    rounds, _, m = key_cluster.shape
    tiles = number if tile_cluster is None else tile_cluster.shape[-1]
    slots_q, slots_k = rounds * tiles * tile, rounds * number * size
    return Clusters(
        query_cluster=_number_across_rounds(query_cluster, number, placed_q, -1),
        key_cluster=_number_across_rounds(key_cluster, number, placed_k, -2),
        tile_cluster=None
        if tile_cluster is None
        else _number_across_rounds(tile_cluster, number).transpose(0, 1).flatten(1),
        queries=build_layout(_number_across_rounds(slot_q, tiles * tile, placed_q, slots_q), slots_q),
        keys=build_layout(_number_across_rounds(slot_k, number * size, placed_k, slots_k), slots_k),
        number=rounds * number,
        filled=placed_k is None and m == number * size,
    )


def lay_out(
    query_cluster: Int[Tensor, "r g n"], number: int, tile: int, most: int
) -> tuple[Int[Tensor, "r g tiles"], Int[Tensor, "r g n"]]:
    """Lay out queries in tiles, each inside one cluster; return the cluster of each tile and the slots of queries.

    A cluster may hold any number of queries; the number of tiles allows for one partly filled tile in each cluster.

    Args:
        query_cluster: Cluster of each query; `number` where it has none and its slot is undefined.
        number: Number of clusters.
        tile: Number of queries in a tile.
        most: Largest number of queries that have a cluster.
    """
    tiles = (most + number * (tile - 1)) // tile
    count = query_cluster.new_zeros(*query_cluster.shape[:2], number + 1).scatter_add_(
        -1, query_cluster, torch.ones_like(query_cluster)
    )
    filled = -(-count[..., :number] // tile)
    last = filled.cumsum(-1)
    # The place of a query in its cluster is its rank minus the rank of the first query there.
    start = F.pad(last - filled, (0, 1)) * tile - count.cumsum(-1) + count
    slot = start.gather(-1, query_cluster) + compute_ranks(query_cluster)
    each = torch.arange(tiles, device=query_cluster.device).expand(*query_cluster.shape[:2], -1).contiguous()
    return torch.searchsorted(last, each, right=True).clamp_max(number - 1), slot


def _cut(
    values: Float[Tensor, "r g n"], seen: Bool[Tensor, "g n"] | None, clusters: Tensor | int, size: int, rank: Rank
) -> tuple[Int[Tensor, "r g n"], Int[Tensor, "r g n"]]:
    """Cut sorted tokens into clusters whose sizes differ by at most one; return cluster and slot."""
    count = values.shape[-1] if seen is None else seen.sum(-1, keepdim=True).clamp_min(1)
    place = rank(_hide(values, seen))
    of = place * clusters // count
    return of, of * size + place + (-of * count) // clusters


def _place(
    hash_q: Tensor, hash_k: Tensor, clusters: Tensor | int, count: Tensor | int, number: int
) -> Int[Tensor, "r g n"]:
    """Place each query in a cluster; boundaries lie halfway between the keys of neighbouring clusters."""
    ordered = hash_k.sort(dim=-1).values
    cluster = torch.arange(1, number, device=hash_q.device)
    first = (-((-cluster * count) // clusters)).expand(*hash_k.shape[:2], -1)
    above, below = (ordered.gather(-1, x.clamp_max(ordered.shape[-1] - 1)) for x in (first, first - 1))
    boundary = ((above + below) / 2).masked_fill(cluster >= clusters, float("inf"))
    placed = torch.searchsorted(boundary, hash_q.contiguous(), right=True)
    return placed.clamp_max(clusters - 1) if isinstance(clusters, int) else placed.minimum(clusters - 1)


def _hide(x: Tensor, seen: Tensor | None, value: float | int = float("inf")) -> Tensor:
    return x if seen is None else x.masked_fill(~seen, value)


def _number_across_rounds(x: Int[Tensor, "r g n"], size: int, placed: Tensor | None = None, none: int = 0) -> Tensor:
    x = x + torch.arange(len(x), device=x.device)[:, None, None] * size
    return x if placed is None else x.masked_fill(~placed, none)
