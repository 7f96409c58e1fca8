"""The learned ranking of tiles (SeerAttention, arXiv 2410.13276): pooled queries and keys in projections of each head.

The logit of a tile is the product of the projected query with the mean of the projected keys. As projections are
linear, that is the mean of the products over the pairs of the block and the tile, which is what the reference computes,
so that each row pools what it sees and nothing else. The projections learn from an auxiliary loss alone: the divergence
of the softmax of logits from the map of dense attention, of which each tile takes its largest probability.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.shared.functional import fill_hidden
from thresher.attention.shared.selectors import Selector

LOSS, WEIGHT = "gate", 1.0


class TileGate(Selector):
    """Projections of queries and keys, one pair for each head; at first they change nothing.

    Args:
        num_heads: Number of query heads.
        head_dim: Width of queries and keys.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        same = torch.eye(head_dim).expand(num_heads, -1, -1)
        self.of_queries, self.of_keys = nn.Parameter(same.clone()), nn.Parameter(same.clone())

    def forward(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
        """Project queries and keys; tokens get no gradient."""
        return q.detach() @ self.of_queries.to(q.dtype), k.detach() @ self.of_keys.to(k.dtype)


def measure_gate_loss(
    logits: Float[Tensor, "b h rows tiles"],
    wanted: Float[Tensor, "b h rows tiles"],
    seen: Bool[Tensor, "#b #h #rows tiles"],
) -> Float[Tensor, "b h"]:
    """Measure the mean divergence of the softmax over tiles from the wanted distribution, over rows that see any.

    Args:
        logits: Of tiles.
        wanted: What they should be, up to a factor of the row; 0 where unseen.
        seen: Which tiles a row sees.
    """
    some = seen.any(-1, keepdim=True)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
    logs = fill_hidden(logits, seen | ~some, float("-inf")).log_softmax(-1).masked_fill(~seen, 0)
    each = (torch.special.xlogy(wanted, wanted) - wanted * logs).sum(-1)
    rows = some.squeeze(-1).sum(-1).expand(logits.shape[:2]) * (logits.shape[2] // some.shape[2])
    return each.masked_fill(~some.squeeze(-1), 0).sum(-1) / rows.clamp_min(1)
