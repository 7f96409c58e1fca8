"""Dominance and the Pareto front."""

from collections.abc import Sequence
from operator import ge


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Tell whether point a is nowhere worse than b, and better somewhere; larger coordinates are better."""
    return tuple(a) != tuple(b) and all(map(ge, a, b))


def find_pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Find the points that no other dominates; return their places, the best in the first coordinate first.

    Equal points are on the front together.

    Args:
        points: Finite coordinates, equally many for each point; larger ones are better.
    """
    front: list[int] = []
    # In this order a point can be dominated only by earlier ones, most often by the latest on the front.
    for i in sorted(range(len(points)), key=lambda i: tuple(points[i]), reverse=True):
        if not any(dominates(points[other], points[i]) for other in reversed(front)):
            front.append(i)
    return front
