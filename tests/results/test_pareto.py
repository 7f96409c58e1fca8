"""Dominance and the Pareto front, against their definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.results.pareto import dominates, find_pareto_front

Point = tuple[int, ...]
POINTS = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 5)] * n), max_size=30))


def beats(a: Point, b: Point) -> bool:
    return not any(x < y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@given(POINTS)
@settings(deadline=None)
def test_front_is_what_nothing_beats(points: list[Point]) -> None:
    wanted = {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
    assert set(find_pareto_front(points)) == wanted
    assert all(dominates(a, b) == beats(a, b) for a in points for b in points)


def test_front_begins_with_the_best_in_the_first_respect() -> None:
    assert find_pareto_front([(-3, 9), (-1, 5), (-2, 7), (-2, 4)]) == [1, 2, 0]
    assert find_pareto_front([]) == []


def test_equal_points_are_on_the_front_together() -> None:
    assert find_pareto_front([(1, 1), (1, 1), (0, 1)]) == [0, 1]
