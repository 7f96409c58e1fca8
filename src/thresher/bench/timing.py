"""Interleaved timing: every repetition times each contender once, so that whatever slows the machine slows all."""

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
    """Reads the time on a device, after the work that was handed to it is done."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def now(self) -> float:
        """Return seconds."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def interleaved(
    passes: Mapping[Name, Pass], repetitions: int, seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[Name, list[Sequence[float]]]:
    """Time several passes in turn, the order reversed in every other repetition.

    Each runs once beforehand, unrecorded. After `seconds` no further repetition begins, but `AT_LEAST` are made.

    Returns:
        What each pass returned, by its name, once for each repetition.
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


def spread(seconds: Sequence[float]) -> Spread:
    """Return median and quartiles of some times, in milliseconds."""
    times = [1000 * x for x in seconds]
    if len(times) == 1:
        return Spread(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, low, high)
