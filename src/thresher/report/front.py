"""The Pareto front: what nothing else beats in both respects."""

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float], *, lower_is_better: bool = False) -> list[int]:
    """Return the places of the points on the front, cheapest first.

    A point is off the front if another costs no more and is no worse, and differs in one of the two for the better.
    Equal points are on it together.

    Args:
        costs: Finite; less is better.
        values: Finite, as many; more is better unless `lower_is_better`.
        lower_is_better: Whether less is better of `values` too.
    """
    worth = [-value if lower_is_better else value for value in values]
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -worth[i]))
    front: list[int] = []
    for i in order:
        if not front or worth[i] > worth[front[-1]] or (costs[i], worth[i]) == (costs[front[-1]], worth[front[-1]]):
            front.append(i)
    return front
