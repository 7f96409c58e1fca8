"""None: each token keeps its own value; no token sees another.

Keeps      the diagonal.
Costs      no MACs.
Trains     nothing of its own; queries and keys receive no gradient.
Use        a baseline: the quality of a network without attention. Self attention only, since a query of cross
           attention has no value of its own.
"""

from thresher.attention.contract import Attended, Cost, Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.prepared import Prepared
from thresher.attention.shared.visibility import refuse_unknown_order, take_own_rows


class NoAttention(Mechanism):
    """Identity attention: out = v."""

    supports = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    content_based = False
    keeps_types = True
    traces_itself = True

    def check(self, x: Prepared) -> None:
        if x.n > x.m:
            raise ValueError(f"self attention needs a value for every query, got {x.n} queries and {x.m} values")
        if x.n < x.m:
            refuse_unknown_order(x.call, self.pattern, x.n, x.m, type(self).__name__)

    def reference(self, x: Prepared) -> Attended:
        b, h, n, m = x.shape
        own = x.v.new_ones(b, h, n).bool()
        if x.visible is not None:
            at = x.places[:, None, :, None].expand(len(x.visible), x.visible.shape[1], n, 1)
            own = x.visible.expand(-1, -1, n, m).gather(-1, at).squeeze(-1).expand(b, h, n)
        values = take_own_rows(x.v, x.call, n).masked_fill(~own[..., None], 0)
        out = x.drop(own.to(x.v.dtype)[..., None]) * values
        free, dense = x.pairs * 0, x.pairs * (x.head_dim + x.value_dim)
        return Attended(out, Cost(free, free, free, dense, own.sum(-1).float(), x.pairs))
