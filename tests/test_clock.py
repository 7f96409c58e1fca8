"""Times as people read them."""

import math

import pytest

from thresher.callbacks import progress
from thresher.clock import clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"),
        (59.6, "01:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90_061, "25:01:01"),
        (None, "?"),
        (math.inf, "?"),
    ],
)
def test_a_time_is_written_and_days_do_not_vanish(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_the_time_left_of_a_training_counts_beyond_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    left = progress.TimeLeft()
    left.start(0.0)
    assert left.text(0.0) == "?"
    now[0] = 3600.0
    assert left.text(0.02) == "49:00:00"
