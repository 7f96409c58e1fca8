"""The Pareto front, against its definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.report.front import pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


def by_definition(points: list[tuple[int, int]], sign: int) -> set[int]:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and sign * a[1] >= sign * b[1] and a != b

    return {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}


@given(POINTS)
@settings(deadline=None)
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    costs, values = [p[0] for p in points], [p[1] for p in points]
    assert set(pareto_front(costs, values)) == by_definition(points, 1)
    assert set(pareto_front(costs, values, lower_is_better=True)) == by_definition(points, -1)


def test_front_runs_from_cheap_to_dear() -> None:
    assert pareto_front([3, 1, 2, 2], [9, 5, 7, 4]) == [1, 2, 0]
    assert pareto_front([], []) == []
