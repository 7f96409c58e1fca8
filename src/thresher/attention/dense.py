"""Dense: exact softmax attention over every visible pair.

Keeps      everything.
Costs      D MACs a pair for the score and Dv for the value; all other costs are relative to this.
Trains     nothing of its own.
Emulates   nothing: it calls `scaled_dot_product_attention`, so the results of a host stay the same bit for bit.
"""

from torch import Tensor

from thresher.attention.contract import Attended, Call, Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.prepared import Prepared


class Dense(Mechanism):
    """Softmax attention, softmax(q k^T / sqrt(d)) v."""

    dense_limit = {}
    keeps_types = True

    def reference(self, x: Prepared) -> Attended:
        return x.attend_densely()


def compute_dense_attention(q: Tensor, k: Tensor, v: Tensor, call: Call, pattern: Pattern) -> Tensor:
    """Compute softmax attention over every visible pair, [b, h, n, dv], the expectation of estimators."""
    return Dense(q.shape[1], q.shape[3], pattern)(q, k, v, call).out
