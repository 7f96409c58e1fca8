"""Clusters for causal self attention: blocks of nearby tokens, and segments of keys that end before a query.

Positions are cut into blocks, in which attention is dense and causal, and into segments of 1, 2, 4, ... blocks. At each
of these levels the queries of every odd segment attend to clusters of the keys of the even segment before it. The
binary digits of a query's block select its levels, so each earlier block occurs exactly once. There are about
log2(blocks) levels, with half of the tokens in each. Only the keys of a segment determine its clusters: their norms,
ranks and boundaries. A query is placed by its own hash value, so nothing leaks from later tokens.

Positions count visible keys, so padding moves no boundary, and every segment before a query is full.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.attention.smyrf.clusters import (
    Clusters,
    Directions,
    Rank,
    assemble,
    hash_keys,
    hash_queries,
    lay_out,
    project,
)
from thresher.attention.smyrf.layout import build_layout, compute_ranks


def cluster_causal_tokens(
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g m d"],
    seen_q: Bool[Tensor, "g n"] | None,
    seen_k: Bool[Tensor, "g m"] | None,
    directions: Directions,
    cluster: int,
    *,
    slots: Int[Tensor, "g n"] | None = None,
    aligned: bool,
    rank: Rank = compute_ranks,
) -> list[Clusters]:
    """Build the blocks, which need no hashes, then the clusters of each level of segments.

    Args:
        q: Queries, the last tokens of the sequence unless `slots` are given.
        k: Keys.
        seen_q: Queries that are not hidden; None means all.
        seen_k: Keys that are not hidden; None means all.
        directions: Random directions of the hashes.
        cluster: Number of keys in a cluster; a block holds two clusters, so every segment offers a choice.
        slots: Position of each query's own key; None means the last n keys in order.
        aligned: Whether every query has a visible key of its own.
        rank: Function that ranks hash values.
    """
    n, m = q.shape[1], k.shape[1]
    seen_q, seen_k = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if seen is None else seen
        for x, seen in ((q, seen_q), (k, seen_k))
    )
    count = seen_k.cumsum(-1)
    own = count[:, m - n :] if slots is None else count.gather(-1, slots)
    position_q, position_k = own - 1, count - 1
    block = 2 * cluster
    parts = [_build_blocks(position_q, position_k, seen_q, seen_k, block, aligned=aligned)]
    if m <= block:
        return parts
    order = build_layout(position_k.masked_fill(~seen_k, m)[None], m).token.clamp_max(m - 1)
    norm_q, norm_k = (torch.linalg.vector_norm(x, dim=-1) for x in (q, k))
    unit_q = project(q, directions) / norm_q.clamp_min(1e-12)
    projected_k = project(k, directions)
    norm_k, projected_k = (x.gather(-1, order.expand_as(x)) for x in (norm_k, projected_k))
    tile = max(min(n // -(-m // cluster), cluster) // 2, 1)
    length = block
    while length < m:
        pairs = -(-m // length) // 2
        late = seen_q & (position_q // length % 2 == 1)
        early = seen_k & (position_k // length % 2 == 0) & ((position_k // length + 1) * length < count[:, -1:])
        here = torch.arange(pairs, device=q.device)[:, None] * 2 * length + torch.arange(length, device=q.device)
        norm = norm_k[:, here]
        largest = norm.amax(-1)
        rest = (largest[..., None].square() - norm.square()).clamp_min(0).sqrt()
        hash_k = hash_keys(projected_k[:, :, here], rest, directions)
        pair = (position_q // (2 * length)).clamp(0, pairs - 1)
        hash_q = hash_queries(unit_q * largest.gather(-1, pair), torch.zeros_like(norm_q), directions)
        ordered = rank(hash_k.flatten(1, 2)).view_as(hash_k)
        slots = (ordered + torch.arange(pairs, device=q.device)[:, None] * length).flatten(2)
        place = position_k // (2 * length) * length + position_k % length
        slot_k = slots.gather(-1, place.clamp(0, pairs * length - 1).expand(len(slots), -1, -1))
        number = pairs * length // cluster
        query_cluster = pair * (length // cluster) + _search(hash_q, hash_k, pair, cluster)
        most = m // (2 * length) * length + max(m % (2 * length) - length, 0) if aligned else n
        tile_cluster, slot_q = lay_out(query_cluster.masked_fill(~late, number), number, tile, most)
        sizes = number, tile, cluster
        part = assemble(query_cluster, slot_k // cluster, tile_cluster, slot_q, slot_k, late, early, sizes)
        parts.append(part._replace(filled=True))
        length *= 2
    return parts


def _build_blocks(
    position_q: Int[Tensor, "g n"],
    position_k: Int[Tensor, "g m"],
    seen_q: Bool[Tensor, "g n"],
    seen_k: Bool[Tensor, "g m"],
    block: int,
    *,
    aligned: bool,
) -> Clusters:
    n, m = position_q.shape[-1], position_k.shape[-1]
    number = -(-m // block)
    query_cluster, tile_cluster, slot_q, tile = position_q[None] // block, None, position_q[None], block
    if not aligned:
        tile = block if n == m else max(min(n // number, block), 1)
        tile_cluster, slot_q = lay_out(query_cluster.masked_fill(~seen_q, number), number, tile, n)
    sizes = number, tile, block
    return assemble(
        query_cluster, position_k[None] // block, tile_cluster, slot_q, position_k[None], seen_q, seen_k, sizes
    )._replace(causal=True)


def _search(
    hash_q: Float[Tensor, "r g n"], hash_k: Float[Tensor, "r g pairs length"], pair: Int[Tensor, "g n"], cluster: int
) -> Int[Tensor, "r g n"]:
    """Find the cluster of each query inside its segment by bisection.

    A segment has a power of two clusters; boundaries lie halfway between the keys of neighbouring clusters.
    """
    ordered = hash_k.sort(dim=-1).values
    boundary = (ordered[..., cluster::cluster] + ordered[..., cluster - 1 : -1 : cluster]) / 2
    inner = boundary.shape[-1]
    boundary = boundary.flatten(2)
    found = torch.zeros_like(hash_q, dtype=torch.long)
    step = (inner + 1) // 2
    while step:
        found += step * (hash_q >= boundary.gather(-1, pair * inner + found + step - 1))
        step //= 2
    return found
