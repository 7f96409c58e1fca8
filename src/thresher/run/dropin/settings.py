"""The settings of the mechanisms to drop in."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thresher.attention.options import flatten_options, nest_options

KEPT = "kept"  # a knob that is not a hyper-parameter: thresholds are calibrated to keep this share of the visible pairs


@dataclass(frozen=True)
class Setting:
    """One mechanism with its hyper-parameters.

    Attributes:
        attention: Its name.
        knobs: Values by dotted name, `kept` included.
    """

    attention: str
    knobs: Mapping[str, Any]

    @property
    def kept(self) -> float | None:
        """The share of the visible pairs that thresholds are calibrated to keep, if they are."""
        return self.knobs.get(KEPT)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments of the mechanism."""
        return nest_options({name: value for name, value in self.knobs.items() if name != KEPT})

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.knobs.items())


def list_settings(mechanisms: Mapping[str, Mapping[str, Any] | None]) -> list[Setting]:
    """List every combination of the values given for each mechanism.

    `{"topk": {"keys": [0.1, 0.5]}, "dense": {}}` gives three settings; a single value needs no list.
    """
    settings = []
    for name, options in mechanisms.items():
        knobs = flatten_options(options or {})
        values = [value if isinstance(value, list) else [value] for value in knobs.values()]
        settings += [Setting(name, dict(zip(knobs, each, strict=True))) for each in itertools.product(*values)]
    return settings
