"""Tiles of consecutive keys: sums over them, what rows see of them, and the choice of the best ones.

The last tile may be shorter. Arrays over keys have the keys in their last dimension.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.prepared import Prepared


def split_tiles(x: Shaped[Tensor, "*rows m"], size: int) -> Shaped[Tensor, "*rows tiles size"]:
    """Split keys into tiles; the last one is filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def sum_tiles(x: Shaped[Tensor, "*rows m"], size: int) -> Shaped[Tensor, "*rows tiles"]:
    """Sum over the keys of each tile."""
    return x if size == 1 else split_tiles(x, size).sum(-1)


def expand_tiles(x: Shaped[Tensor, "*rows tiles"], size: int, m: int) -> Shaped[Tensor, "*rows m"]:
    """Give each of m keys what belongs to its tile."""
    return x if size == 1 else x.repeat_interleave(size, -1)[..., :m]


def count_seen_keys(x: Prepared, size: int) -> Int[Tensor, "#b #h #n tiles"]:
    """Count the keys of each tile that each row sees."""
    visible = torch.ones(1, 1, 1, x.m, dtype=torch.bool, device=x.device) if x.visible is None else x.visible
    return sum_tiles(visible.long(), size)


def find_seen_tiles(x: Prepared, size: int) -> Bool[Tensor, "#b #h #n tiles"]:
    """Find the tiles of which each row sees a key, without a mask of all pairs unless the call has one."""
    if x.call.pairs is not None:
        return count_seen_keys(x, size) > 0
    shown = torch.ones(1, x.m, dtype=torch.bool, device=x.device) if x.call.keys is None else x.call.keys
    index = torch.arange(x.m, device=x.device).expand_as(shown).masked_fill(~shown, x.m)
    first = F.pad(index, (0, -x.m % size), value=x.m).unflatten(-1, (-1, size)).amin(-1)[:, None, None]
    seen = first < x.m
    if x.causal_shift is not None:
        seen = first <= (torch.arange(x.n, device=x.device) + x.causal_shift)[:, None]
    return seen if x.call.queries is None else seen & x.call.queries[:, None, :, None]


def find_own_tile(x: Prepared, size: int) -> Int[Tensor, "#b 1 n 1"] | None:
    """Find the tile of each query's own key; None in cross attention, where there is none."""
    return None if x.pattern.cross else x.places[:, None, :, None] // size


def average_tiles(
    pairs: Float[Tensor, "b h n m"], x: Prepared, size: int
) -> tuple[Float[Tensor, "b h n tiles"], Bool[Tensor, "#b #h #n tiles"]]:
    """Average numbers of pairs over the keys of each tile that the row sees; return what rows see, too.

    For scores this is the product of the query with the mean of these keys. Keys that the row does not see have no
    part in it, so a causal row learns nothing of later keys in its own tile.
    """
    count = count_seen_keys(x, size)
    shown = pairs if x.visible is None else pairs.masked_fill(~x.visible, 0)
    return sum_tiles(shown, size) / count.clamp_min(1), count > 0


def average_keys(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], x: Prepared, size: int
) -> tuple[Float[Tensor, "b h n tiles"], Bool[Tensor, "#b #h #n tiles"]]:
    """Do the same as `average_tiles` for the products of queries and keys, from the means of keys.

    For calls without masks of pairs. Of its own tile a causal row sees the keys up to its own, by running sums.

    Args:
        q: Queries.
        k: Keys; zero where hidden.
        x: The call, with the tokens in order.
        size: Keys in a tile.
    """
    shown = k.new_ones(1, 1, x.m) if x.call.keys is None else x.call.keys[:, None].to(k.dtype)
    tiles = F.pad(k, (0, 0, 0, -x.m % size)).unflatten(2, (-1, size))
    counts = split_tiles(shown, size)
    products = q @ tiles.sum(3).mT / counts.sum(-1).clamp_min(1)[:, :, None]
    if x.causal_shift is None:
        return products, find_seen_tiles(x, size)
    past = slice(x.causal_shift, x.causal_shift + x.n)
    sums, number = tiles.cumsum(3).flatten(2, 3)[:, :, past], counts.cumsum(-1).flatten(-2)[..., past]
    own = torch.arange(past.start, past.stop, device=k.device)[:, None] // size
    of_own = (q * sums).sum(-1, keepdim=True) / number.clamp_min(1)[..., None]
    return products.scatter(-1, own.expand(*q.shape[:3], 1), of_own), find_seen_tiles(x, size)


def choose_best(
    logs: Float[Tensor, "b h rows tiles"],
    seen: Bool[Tensor, "#b #h #rows tiles"],
    own: Int[Tensor, "#b 1 rows 1"] | None,
    number: int,
) -> Bool[Tensor, "b h rows tiles"]:
    """Choose a number of tiles that rank best among those that a row sees, its own one before all others."""
    logs = logs.detach()
    if own is not None:
        logs = logs.scatter(-1, own.expand(*logs.shape[:3], 1), float("inf"))
    logs = logs.masked_fill(~seen, float("-inf"))
    best = logs.topk(min(number, logs.shape[-1]), -1).indices
    return torch.zeros_like(logs, dtype=torch.bool).scatter(-1, best, True) & seen


def count_ranked_tiles(x: Prepared, size: int, together: int) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """Count the products of pooled queries and keys, and the tokens that were pooled on both sides.

    Args:
        x: The call.
        size: Keys in a tile.
        together: Queries that are pooled; 1 pools none.
    """
    seen = find_seen_tiles(x, size).expand(-1, -1, x.n, -1)
    if together > 1:
        missing = -x.n % together
        seen = F.pad(seen, (0, 0, 0, missing)).unflatten(2, (-1, together)).any(3)
    tokens = seen.any(-1).sum(-1) + seen.any(-2).sum(-1)
    ranked = seen.sum((-2, -1))
    return ranked.float().expand(x.batch, x.heads), tokens.float().expand(x.batch, x.heads)
