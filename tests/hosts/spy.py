"""Dense attention that remembers its calls."""

from thresher.attention import Attended, Call, Prepared
from thresher.attention.dense import Dense


class Spy(Dense):
    """Notes what it is told."""

    calls: list[Call] = []

    def reference(self, x: Prepared) -> Attended:
        self.calls.append(x.call)
        return super().reference(x)
