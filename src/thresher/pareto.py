"""Dominance: what nothing else beats in everything that counts."""

from collections.abc import Sequence
from operator import ge


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Say whether a point is nowhere worse than another, and better somewhere; more is better in each place."""
    return tuple(a) != tuple(b) and all(map(ge, a, b))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the points that no other dominates, best in the first respect first.

    Equal points are on the front together.

    Args:
        points: Finite values, as many for each point; more is better in each place.
    """
    front: list[int] = []
    # Whatever could dominate comes first in this order, and what was found last dominates most often.
    for i in sorted(range(len(points)), key=lambda i: tuple(points[i]), reverse=True):
        if not any(dominates(points[other], points[i]) for other in reversed(front)):
            front.append(i)
    return front
