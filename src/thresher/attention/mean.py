"""Mean: every query receives the mean of the values it can see, whatever the content.

Keeps      every visible pair, with equal weight.
Costs      Dv MACs a pair; no scores.
Trains     nothing of its own; queries and keys receive no gradient.
Use        a baseline: what a network reaches when attention only pools.
"""

from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, Cost, Mechanism
from thresher.attention.functional import at_least_fp32, expand_heads
from thresher.attention.visibility import count_pairs, hide_tokens, visible_pairs


class Mean(Mechanism):
    """Uniform attention over the visible keys."""

    content_based = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        shape = (*q.shape[:3], k.shape[2])
        k, v = expand_heads(k, shape[1]), expand_heads(v, shape[1])
        visible = visible_pairs(call, self.pattern, shape[2], shape[3], q.device)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        weights = at_least_fp32(v.new_ones(shape)) if visible is None else at_least_fp32(v.new_zeros(shape)) + visible
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        out = F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v
        pairs = count_pairs(visible, shape, q.device)
        value = pairs * v.shape[-1]
        return Attended(out, Cost(pairs * 0, value, pairs * 0, pairs * q.shape[-1] + value, pairs, pairs))
