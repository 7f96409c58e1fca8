"""Which drivers still live, judged without comparing the clocks of two machines."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from thresher.sweep import processes


class Pulse:
    """Watches drivers' signs of life.

    A driver of this machine is dead when its process is. One of another is dead when its sign of life has not
    changed for `patience` seconds while it was watched.

    Args:
        me: The driver that watches.
        patience: Seconds.
        clock: What tells the time.
    """

    def __init__(self, me: str, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._me = me
        self._patience = patience
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def dead(self, drivers: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Return the drivers that are gone."""
        return {name for name, driver in drivers.items() if name != self._me and self._is_dead(name, driver)}

    def _is_dead(self, name: str, driver: Mapping[str, Any]) -> bool:
        if driver["ended"]:
            return True
        if processes.is_here(driver):
            return not processes.is_alive(driver)
        return self.unchanged(f"driver {name}", driver["beat"])

    def unchanged(self, name: str, sign: Any) -> bool:
        """Say whether a sign has stayed the same for as long as patience lasts."""
        now = self._clock()
        last, since = self._seen.get(name, (None, now))
        if last != sign:
            since = now
        self._seen[name] = (sign, since)
        return now - since >= self._patience
