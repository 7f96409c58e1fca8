"""When a trial has no prospects: others were better at the same epoch, in everything that counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Curve = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Pruning:
    """Stops a trial that several others dominate.

    Args:
        monitor: Column of the CSV log for each objective, in their order.
        maximize: Whether more is better, for each.
        start: First epoch that is judged, from 0. Earlier ones say little while a budget still comes down.
        quorum: How many others must be better at that epoch.
    """

    monitor: tuple[str, ...]
    maximize: tuple[bool, ...]
    start: int
    quorum: int

    def hopeless(self, curve: Curve, others: Iterable[Curve]) -> bool:
        """Say whether enough others dominate a trial at its latest epoch."""
        if not curve or max(curve) < self.start:
            return False
        epoch = max(curve)
        better = sum(self._dominates(other[epoch], curve[epoch]) for other in others if epoch in other)
        return better >= self.quorum

    def _dominates(self, a: Sequence[float], b: Sequence[float]) -> bool:
        gains = [x - y if up else y - x for x, y, up in zip(a, b, self.maximize, strict=True)]
        return min(gains) >= 0 and max(gains) > 0
