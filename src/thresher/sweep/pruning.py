"""When a trial has no prospects: others were better at the same epoch, in everything that counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from thresher.pareto import dominates

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
        own = self._worth(curve[epoch])
        better = sum(dominates(self._worth(other[epoch]), own) for other in others if epoch in other)
        return better >= self.quorum

    def _worth(self, values: Sequence[float]) -> list[float]:
        return [value if up else -value for value, up in zip(values, self.maximize, strict=True)]
