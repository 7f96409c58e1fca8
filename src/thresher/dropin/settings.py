"""Which mechanisms are dropped in, at which settings of their knobs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEPT = "kept"  # a knob that is no hyper-parameter: thresholds are calibrated to keep this share of the visible pairs


@dataclass(frozen=True)
class Setting:
    """One mechanism with its hyper-parameters.

    Attributes:
        attention: Its name.
        knobs: What was set, `kept` included.
    """

    attention: str
    knobs: Mapping[str, Any]

    @property
    def kept(self) -> float | None:
        """The share of the visible pairs that thresholds are calibrated to keep, if they are."""
        return self.knobs.get(KEPT)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the mechanism is built with."""
        return {name: value for name, value in self.knobs.items() if name != KEPT}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.knobs.items())


def settings_of(mechanisms: Mapping[str, Mapping[str, Any] | None]) -> list[Setting]:
    """Return every combination of the values that are listed for each mechanism.

    `{"topk": {"keys": [0.1, 0.5]}, "dense": {}}` gives three settings; a single value needs no list.
    """
    settings = []
    for name, knobs in mechanisms.items():
        values = [value if isinstance(value, list) else [value] for value in (knobs or {}).values()]
        settings += [Setting(name, dict(zip(knobs or {}, each, strict=True))) for each in itertools.product(*values)]
    return settings
