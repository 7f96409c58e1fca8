"""Clusters of queries and keys, as SMYRF forms them: where tokens go, and how queries are laid out in tiles."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.layout import Layout, layout_of, rank_of


class Clusters(NamedTuple):
    """An assignment of queries and keys to clusters, one for each round and group.

    Attributes:
        of_query: Cluster of each query; `number` where it is hidden.
        of_key: Cluster of each key; `number` where it is hidden.
        of_tile: Cluster that each tile of queries attends to.
        queries: Where queries go: tiles of equal size, each inside one cluster.
        keys: Where keys go: clusters of equal size.
        number: Largest number of clusters of any group.
    """

    of_query: Int[Tensor, "r g n"]
    of_key: Int[Tensor, "r g m"]
    of_tile: Int[Tensor, "r g tiles"] | None
    queries: Layout
    keys: Layout
    number: int


def place(hash_q: Tensor, hash_k: Tensor, clusters: Tensor, count: Tensor, number: int) -> Tensor:
    """Return the cluster of each query by boundaries halfway between the keys of neighbouring clusters."""
    ordered = hash_k.sort(dim=-1).values
    cluster = torch.arange(1, number, device=hash_q.device)
    first = -((-cluster * count) // clusters)
    inside = cluster < clusters
    above = ordered.gather(-1, first.clamp_max(ordered.shape[-1] - 1).expand(*ordered.shape[:2], -1))
    below = ordered.gather(-1, (first - 1).clamp_max(ordered.shape[-1] - 1).expand(*ordered.shape[:2], -1))
    boundary = ((above + below) / 2).masked_fill(~inside, float("inf"))
    return torch.searchsorted(boundary, hash_q.contiguous(), right=True).minimum(clusters - 1)


def tiles(of_query: Tensor, number: int, cluster: int, aligned: bool) -> tuple[Layout, Tensor | None]:
    """Lay queries out in tiles, each inside one cluster; aligned tiles are one for each cluster, in order.

    A cluster may hold any number of queries, where it is not by construction the number of its keys: the
    static bound is one partly filled tile for each cluster.
    """
    rounds, g, n = of_query.shape
    size = cluster if aligned else max(-(-n // number), 1)
    number_of_tiles = number if aligned else -(-n // size) + number
    ones = torch.ones_like(of_query)
    count = of_query.new_zeros(rounds, g, number + 1).scatter_add_(-1, of_query, ones)[..., :number]
    tiles = -(-count // size)
    start = F.pad(count.cumsum(-1), (1, 0))
    first = F.pad(tiles.cumsum(-1) - tiles, (0, 1))
    slots = number_of_tiles * size
    slot = first.gather(-1, of_query) * size + rank_of(of_query) - start.gather(-1, of_query)
    layout = layout_of(slot.masked_fill(of_query == number, slots), slots)
    if aligned:
        return layout, None
    tile = torch.arange(number_of_tiles, device=of_query.device).expand(rounds, g, -1).contiguous()
    return layout, torch.searchsorted(tiles.cumsum(-1), tile, right=True).clamp_max(number - 1)
