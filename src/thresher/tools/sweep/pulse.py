"""The pulse of drivers: which of them are dead, without comparing the clocks of two machines."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from thresher.tools.sweep import processes


class Pulse:
    """Watches drivers' signs of life.

    A driver of this machine is dead when its process is. One of another is dead when its sign of life has not
    changed for `patience` seconds while it was watched.

    Args:
        me: The driver that watches.
        patience: Seconds.
        clock: Returns the time in seconds.
    """

    def __init__(self, me: str, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._me = me
        self._patience = patience
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def find_dead(self, drivers: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Find the drivers that are dead."""
        return {name for name, driver in drivers.items() if name != self._me and self._is_dead(name, driver)}

    def _is_dead(self, name: str, driver: Mapping[str, Any]) -> bool:
        if driver["ended"]:
            return True
        if processes.is_here(driver):
            return not processes.is_alive(driver)
        return self.is_unchanged(f"driver {name}", driver["beat"])

    def is_unchanged(self, name: str, sign: Any) -> bool:
        """Tell whether a sign of life has stayed the same for `patience` seconds."""
        now = self._clock()
        last, since = self._seen.get(name, (None, now))
        if last != sign:
            since = now
        self._seen[name] = (sign, since)
        return now - since >= self._patience
