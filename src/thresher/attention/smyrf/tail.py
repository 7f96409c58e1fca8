"""The tail of SMYRF: what each row drops, as one more key in the softmax over what it meets.

All dropped keys of a row weigh alike (`attention/shared/tail.py`), so their number, their mean score and the mean of
their values say everything. These are sums over the keys that a row sees, less those that it meets. A pair that meets
in several rounds counts once: each of its meetings has the share 1 / number of meetings. The sum of scores is the
product of the query and the sum of the dropped keys, so nothing here has n x m entries unless the call itself has a
mask of pairs or a bias.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import fill_hidden
from thresher.attention.smyrf.layout import gather_slots, sum_slots
from thresher.attention.smyrf.tiles import Dropped, Tiles, find_tile_keys, find_tile_queries


def sum_met_keys(
    x: Prepared, tiles: Tiles, share: Float[Tensor, "g tiles #s c"], bias: Float[Tensor, "g tiles s c"] | None
) -> Float[Tensor, "g n sums"]:
    """Sum keys, values, ones and biases, if there are any, over the keys that each query meets in one part.

    Args:
        x: The call.
        tiles: Tiles of the part.
        share: Share of each meeting, 1 / number of meetings of the pair; 0 where a pair is hidden.
        bias: Bias of each pair.
    """
    rows = torch.cat([x.k, x.v, torch.ones_like(x.k[..., :1])], -1).flatten(0, 1)
    token_q, token_k = find_tile_queries(tiles), find_tile_keys(tiles)
    sums = share @ gather_slots(rows, token_k.flatten(1)).view(*token_k.shape, -1)
    sums = sums.expand(-1, -1, token_q.shape[2], -1)
    if bias is not None:
        sums = torch.cat([sums, (share * bias).sum(-1, keepdim=True)], -1)
    return sum_slots(sums.flatten(1, 2), tiles.queries)


def find_dropped_keys(x: Prepared, met: Float[Tensor, "g n sums"], factor: Float[Tensor, " h"]) -> Dropped:
    """Find the keys that each row drops, from the sums over those that it meets in all parts."""
    d, dv = x.head_dim, x.value_dim
    seen = x.visible_keys.expand(x.batch, x.heads, x.n)
    number = seen.flatten(0, 1) - met[..., d + dv].detach().round()
    divisor = number.clamp_min(1)
    rows = (sum_visible_tokens(x, torch.cat([x.k, x.v], -1)).flatten(0, 1) - met[..., : d + dv]) / divisor[..., None]
    key, value = rows.split([d, dv], -1)
    score = (x.q.flatten(0, 1) * key).sum(-1) * x.scale
    if x.call.bias is not None:
        biases = fill_hidden(x.call.bias.to(score.dtype), x.visible, 0.0).sum(-1)
        score = score + (biases.expand_as(seen).flatten(0, 1) - met[..., -1]) / divisor
    return Dropped(score, number * factor.repeat(x.batch)[:, None], value)


def sum_visible_tokens(x: Prepared, tokens: Float[Tensor, "b h m c"]) -> Float[Tensor, "b h #n c"]:
    """Sum over the keys that each row sees: the same for all rows, running in causal attention, or by the mask."""
    if x.call.pairs is not None:
        assert x.visible is not None
        return x.visible.to(tokens.dtype) @ tokens
    if x.causal_shift is not None:
        return tokens.cumsum(2)[:, :, x.causal_shift :]
    return tokens.sum(2, keepdim=True)
