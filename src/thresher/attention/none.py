"""None: each token keeps its own value; no token sees another.

Keeps      the diagonal.
Costs      no MACs at all.
Trains     nothing of its own; queries and keys receive no gradient.
Use        a baseline: what a network reaches without attention. Self attention only, since a query of cross
           attention has no value of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.functional import expand_heads
from thresher.attention.visibility import count_pairs, hide_tokens, visible_pairs


class NoAttention(Mechanism):
    """Identity attention: out = v."""

    supports = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    content_based = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        b, h, n, m = shape = (*q.shape[:3], k.shape[2])
        if n > m:
            raise ValueError(f"self attention needs a value for every query, got {n} queries and {m} values")
        k, v = expand_heads(k, h), expand_heads(v, h)
        visible = visible_pairs(call, self.pattern, n, m, q.device)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        own = v.new_ones(b, h, n, dtype=torch.bool)
        if visible is not None:
            own = visible.expand(-1, -1, n, m).diagonal(m - n, -2, -1).expand(b, h, n)
        out = F.dropout(own.to(v.dtype)[..., None], self.dropout, self.training) * v[:, :, m - n :]
        pairs = count_pairs(visible, shape, q.device)
        free = pairs * 0
        dense = pairs * (q.shape[-1] + v.shape[-1])
        return Attended(out, Cost(free, free, free, dense, own.sum(-1).float(), pairs))
