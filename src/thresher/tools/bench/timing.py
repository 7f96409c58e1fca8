"""Interleaved timing: each repetition times every contender once, so that a slow machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

AT_LEAST = 3  # repetitions, however long they take

Name = TypeVar("Name", bound=Hashable)
Pass = Callable[[], Sequence[float]]  # runs once; returns the seconds of its parts


class Spread(NamedTuple):
    """Median and quartiles in milliseconds."""

    median: float
    low: float
    high: float


class Clock:
    """Reads the time after the work queued on a device is done."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def now(self) -> float:
        """Return seconds."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def time_interleaved(
    passes: Mapping[Name, Pass], repetitions: int, seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[Name, list[Sequence[float]]]:
    """Time several passes in turns, in reverse order in every other repetition.

    Each pass runs once before the first repetition. No repetition begins after `seconds`, but at least `AT_LEAST` run.

    Returns:
        The results of each pass, one for each repetition, by its name.
    """
    start = clock()
    for one_pass in passes.values():
        one_pass()
    recorded: dict[Name, list[Sequence[float]]] = {name: [] for name in passes}
    for repetition in range(repetitions):
        if repetition >= AT_LEAST and clock() - start > seconds:
            break
        for name in list(passes)[:: -1 if repetition % 2 else 1]:
            recorded[name].append(passes[name]())
    return recorded


def compute_spread(seconds: Sequence[float]) -> Spread:
    """Compute median and quartiles of times in seconds; return them in milliseconds."""
    times = [1000 * x for x in seconds]
    if len(times) == 1:
        return Spread(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, low, high)
