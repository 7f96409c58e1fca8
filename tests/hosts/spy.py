"""Dense attention that remembers its calls."""

from torch import Tensor

from thresher.attention import Attended, Call
from thresher.attention.dense import Dense


class Spy(Dense):
    """Notes what it is told."""

    calls: list[Call] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        self.calls.append(call)
        return super().forward(q, k, v, call)
