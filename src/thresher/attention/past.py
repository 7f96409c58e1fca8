"""Clusters for causal self attention: the present in blocks, the past in segments that end before a query begins.

Positions are cut into blocks, in which attention is dense and causal, and into segments of 1, 2, 4, ... blocks. At each
of these levels the queries of every odd segment attend to clusters of the keys of the even segment before it. The
levels of a query are the binary digits of its block, so they hold each earlier block exactly once; there are about
log2 of the number of blocks, and half of the tokens take part in each. Nothing after a segment has a say in its
clusters: its keys alone set norms, ranks and boundaries, and each query is placed by its own value.

Positions count visible keys, so padding moves no boundary, and every segment that has a later query is full.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.attention.clusters import (
    Clusters,
    Directions,
    Rank,
    assemble,
    hash_keys,
    hash_queries,
    lay_out,
    project,
)
from thresher.attention.layout import layout_of, rank_of


def cluster_past(
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g m d"],
    seen_q: Bool[Tensor, "g n"] | None,
    seen_k: Bool[Tensor, "g m"] | None,
    directions: Directions,
    cluster: int,
    *,
    alike: bool,
    rank: Rank = rank_of,
) -> list[Clusters]:
    """Return the blocks, in which no hash is needed, then the clusters of each level of segments.

    Args:
        q: Queries, the last of the sequence.
        k: Keys.
        seen_q: Queries that are not hidden, if any are.
        seen_k: Keys that are not hidden, if any are.
        directions: What tokens are hashed with.
        cluster: Number of keys in a cluster; a block holds two, so that there is something to choose in every segment.
        alike: Every query stands at a visible key of its own.
        rank: What sorts hash values.
    """
    n, m = q.shape[1], k.shape[1]
    seen_q, seen_k = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if seen is None else seen
        for x, seen in ((q, seen_q), (k, seen_k))
    )
    count = seen_k.cumsum(-1)
    position_q, position_k = count[:, m - n :] - 1, count - 1
    block = 2 * cluster
    parts = [_blocks(position_q, position_k, seen_q, seen_k, block, alike=alike)]
    if m <= block:
        return parts
    order = layout_of(position_k.masked_fill(~seen_k, m)[None], m).token.clamp_max(m - 1)
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
        of_query = pair * (length // cluster) + _search(hash_q, hash_k, pair, cluster)
        most = m // (2 * length) * length + max(m % (2 * length) - length, 0) if alike else n
        of_tile, slot_q = lay_out(of_query.masked_fill(~late, number), number, tile, most)
        sizes = number, tile, cluster
        part = assemble(of_query, slot_k // cluster, of_tile, slot_q, slot_k, late, early, sizes)
        parts.append(part._replace(full=True))
        length *= 2
    return parts


def _blocks(
    position_q: Int[Tensor, "g n"],
    position_k: Int[Tensor, "g m"],
    seen_q: Bool[Tensor, "g n"],
    seen_k: Bool[Tensor, "g m"],
    block: int,
    *,
    alike: bool,
) -> Clusters:
    n, m = position_q.shape[-1], position_k.shape[-1]
    number = -(-m // block)
    of_query, of_tile, slot_q, tile = position_q[None] // block, None, position_q[None], block
    if not alike:
        tile = block if n == m else max(min(n // number, block), 1)
        of_tile, slot_q = lay_out(of_query.masked_fill(~seen_q, number), number, tile, n)
    sizes = number, tile, block
    return assemble(
        of_query, position_k[None] // block, of_tile, slot_q, position_k[None], seen_q, seen_k, sizes
    )._replace(present=True)


def _search(
    hash_q: Float[Tensor, "r g n"], hash_k: Float[Tensor, "r g pairs length"], pair: Int[Tensor, "g n"], cluster: int
) -> Int[Tensor, "r g n"]:
    """Return the cluster of each query inside its segment by bisection; there are a power of two of them.

    Boundaries lie halfway between the keys of neighbouring clusters.
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
