"""Pruning: stop a trial that others dominate at the same epoch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from thresher.results.pareto import dominates

Curve = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Pruning:
    """Stops a trial that several others dominate.

    Args:
        monitor: Column of the CSV log for each objective, in their order.
        maximize: Whether larger values are better, for each.
        start: First epoch to compare, from 0. Earlier ones say little while a budget still falls.
        quorum: How many others must dominate it at that epoch.
    """

    monitor: tuple[str, ...]
    maximize: tuple[bool, ...]
    start: int
    quorum: int

    def is_dominated(self, curve: Curve, others: Iterable[Curve]) -> bool:
        """Tell whether enough others dominate a trial at its latest epoch."""
        if not curve or max(curve) < self.start:
            return False
        epoch = max(curve)
        own = self._orient(curve[epoch])
        better = sum(dominates(self._orient(other[epoch]), own) for other in others if epoch in other)
        return better >= self.quorum

    def _orient(self, values: Sequence[float]) -> list[float]:
        return [value if up else -value for value, up in zip(values, self.maximize, strict=True)]
