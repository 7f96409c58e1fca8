"""Dense: exact softmax attention over every visible pair.

Keeps      everything.
Costs      D MACs a pair for the score and Dv for the value; the yardstick of all other costs.
Trains     nothing of its own.
Emulates   nothing: it is PyTorch's `scaled_dot_product_attention`, so that a host's results do not change by a bit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.functional import expand_heads
from thresher.attention.visibility import count_pairs, hide_tokens, visible_pairs


class Dense(Mechanism):
    """Softmax attention, softmax(q k^T / sqrt(d)) v."""

    dense_limit = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        return attend_densely(q, k, v, call, self.pattern, self.dropout if self.training else 0.0)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, call: Call, pattern: Pattern, dropout: float = 0.0) -> Attended:
    """Compute softmax attention over every visible pair, and its cost."""
    shape = (*q.shape[:3], k.shape[2])
    k, v = expand_heads(k, shape[1]), expand_heads(v, shape[1])
    visible = visible_pairs(call, pattern, shape[2], shape[3], q.device)
    q, k, v = hide_tokens(q, k, v, call, pattern)
    mask, empty = call.bias, None
    if shape[3] == 0:
        q = q.masked_fill(q.new_ones((), dtype=torch.bool), 0)  # without a key a row is zero, whatever it asks for
    if visible is not None:
        # Backends differ on rows without a key, so such a row attends to everything and is zeroed afterwards.
        empty = ~visible.any(-1, keepdim=True)
        mask = visible | empty
        if call.bias is not None:
            mask = call.bias.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if empty is not None:
        out = out.masked_fill(empty, 0)
    pairs = count_pairs(visible, shape, q.device)
    score, value = pairs * q.shape[-1], pairs * v.shape[-1]
    return Attended(out.to(v.dtype), Cost(score, value, pairs * 0, score + value, pairs, pairs))
