"""Clusters for tests that compare attention in two types."""

import pytest

from thresher.attention.smyrf.clusters import Clusters
from thresher.attention.smyrf.mechanism import Smyrf


def assign_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every call the clusters of the first: a hash that is rounded otherwise would give another result."""
    assigned: list[list[Clusters]] = []
    original = Smyrf.assign

    def once(self: Smyrf, *given: object) -> list[Clusters]:
        if not assigned:
            assigned.append(original(self, *given))  # type: ignore[arg-type]
        return assigned[0]

    monkeypatch.setattr(Smyrf, "assign", once)
