"""Where a tuning stands, and the file that it continues from."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Start = Literal["share", "value", "greedy"]
STARTS: tuple[Start, ...] = get_args(Start)
Values = list[dict[str, Tensor]]  # states of the modules that are tuned


@dataclass(frozen=True)
class Measurement:
    """What a network with its current thresholds does to held-out batches.

    Attributes:
        error: Of its outputs against those of the dense network.
        kept: Share of the visible pairs.
    """

    error: float
    kept: float


@dataclass
class TuningState:
    """Where a tuning stands.

    Attributes:
        starts: What each start measured, by its name.
        best: The best measurement so far.
        best_values: The values that it belongs to.
        values: The values of the next step.
        step: Number of finished steps.
        multiplier: Of the budget.
        headroom: What allocation gains, as a share of the error, and how uncertain that is; None if it is unknown.
        history: Error and share kept of each step.
        optimizer: State of the optimiser.
        schedule: State of the schedule of learning rates.
    """

    starts: dict[str, Measurement]
    best: Measurement
    best_values: Values
    values: Values
    step: int = 0
    multiplier: float = 0.0
    headroom: tuple[float, float] | None = None
    history: list[Measurement] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)


class Calibrated(NamedTuple):
    """Where a tuning may start.

    Attributes:
        measured: What was measured there.
        values: The values that it belongs to.
        headroom: What allocation gains in the unit of these values, see `TuningState`.
    """

    measured: Measurement
    values: Values
    headroom: tuple[float, float] | None


def begin(starts: Mapping[str, Calibrated]) -> TuningState:
    """Begin from the start that errs least."""
    best = min(starts.values(), key=lambda start: start.measured.error)
    measured = {name: start.measured for name, start in starts.items()}
    return TuningState(measured, best.measured, best.values, best.values, headroom=best.headroom)


class StateFile:
    """The file that a tuning writes at each evaluation.

    Args:
        path: Of the file; None stores nothing.
        settings: What two tunings must share for one to continue the other.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)

    def write(self, state: TuningState) -> None:
        """Replace the file in one move, so that an interrupt leaves the old one or the new one."""
        if self.path is None:
            return
        new = self.path.with_name(f"{self.path.name}.new")
        torch.save({"settings": self.settings, "state": asdict(state)}, new)
        os.replace(new, self.path)

    def read(self) -> TuningState | None:
        """Read the state; None where there is no file.

        Raises:
            ValueError: The file is damaged, or of a tuning with other settings.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, state = saved["settings"], TuningState(**saved["state"])
        except (EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is damaged, or no state of a tuning; remove it to begin again") from error
        if differing := [name for name, value in self.settings.items() if settings.get(name) != value]:
            raise ValueError(
                f"{self.path} is of a tuning with another {', '.join(differing)}; choose another state_file"
            )
        state.starts = {name: Measurement(**each) for name, each in saved["state"]["starts"].items()}
        state.best = Measurement(**saved["state"]["best"])
        state.history = [Measurement(**each) for each in saved["state"]["history"]]
        return state
