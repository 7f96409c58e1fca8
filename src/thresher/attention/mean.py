"""Mean: every query receives the mean of its visible values, independent of content.

Keeps      every visible pair, with equal weight.
Costs      Dv MACs a pair; no scores.
Trains     nothing of its own; queries and keys receive no gradient.
Use        a baseline: the quality of a network whose attention only pools.
"""

from thresher.attention.contract import Attended, Cost
from thresher.attention.mechanism import Mechanism
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import promote_to_fp32


class Mean(Mechanism):
    """Uniform attention over the visible keys."""

    content_based = False
    keeps_types = True
    traces_itself = True

    def reference(self, x: Prepared) -> Attended:
        x.trace_values()
        weights = promote_to_fp32(x.v.new_ones(x.shape))
        if x.visible is not None:
            weights = weights * x.visible
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        pairs = x.pairs
        dense = pairs * (x.head_dim + x.value_dim)
        cost = Cost(pairs * 0, pairs * x.value_dim, pairs * 0, dense, pairs, pairs)
        return Attended(x.drop(weights).to(x.v.dtype) @ x.v, cost)
