"""Where a tuning starts: calibrated in several ways, in each unit, and measured on held-out batches.

Each head keeps the same share of its pairs ("share"); or one value serves all heads, so that heads with flat scores
keep more ("value"); or shares are allocated by sensitivity ("greedy", see `allocation.py`). In which unit thresholds
err less depends on the network: of two that were measured, a sentence encoder does better in spreads, a language model
in nats.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thresher.attention.options import check_choice
from thresher.attention.registry import hyperparameters, name_of
from thresher.attention.shared.offsets import HeadOffsets
from thresher.attention.shared.thresholds import UNITS, Thresholds, Unit
from thresher.budget.allocation import LEVELS, allocate, apply_shares
from thresher.budget.calibration import calibrate
from thresher.budget.settling import settle
from thresher.budget.teacher import HeldOut, Teacher
from thresher.budget.tuning_state import Calibrated, Measurement, Start, Values

CALIBRATION = 4  # batches: a start to tune from, settled on the held-out ones
WIDTHS = {"nats": 0.35, "spread": 0.1}  # of the surrogate of a mechanism that takes this unit


def check_units(name: str, units: Sequence[Unit] | None) -> None:
    """Check units that a tuning may choose from; None leaves thresholds as they are.

    Raises:
        ValueError: There is no such unit, or none is given.
    """
    if units is not None and (isinstance(units, str) or not units):
        raise ValueError(f"{name} must be null or a list with any of {', '.join(UNITS)}; got {units!r}")
    for unit in units or ():
        check_choice(name, unit, UNITS)


def check_owners(model: nn.Module, heads: Mapping[str, HeadOffsets]) -> None:
    """Check that mechanisms have thresholds that count in either unit.

    Raises:
        ValueError: One has not.
    """
    for name, offsets in heads.items():
        kind: Any = type(model.get_submodule(name))
        if not isinstance(offsets, Thresholds) or "unit" not in hyperparameters(kind):
            raise ValueError(
                f"units are those of thresholds, and {name} is {name_of(kind)}, which counts in "
                f"{'factors of its number of keys' if offsets.unit == 'log' else offsets.unit} alone: leave units out"
            )


def measure_starts(
    wanted: Sequence[Start],
    units: Sequence[Unit] | None,
    model: nn.Module,
    batches: Sequence[Any],
    kept: float,
    teacher: Teacher,
    exam: HeldOut,
    heads: Iterable[HeadOffsets],
    trained: Sequence[nn.Module],
    fixed: Sequence[nn.Module],
) -> dict[str, Calibrated]:
    """Calibrate from each start in each unit and measure it; return them by their names.

    Args:
        wanted: The starts.
        units: The units; None is the one that thresholds have.
        model: The model.
        batches: To calibrate on, of which the first are used.
        kept: Share of the pairs to keep.
        teacher: Runs the model.
        exam: Held-out batches.
        heads: The trained offsets.
        trained: The modules whose state is a start.
        fixed: Thresholds that stay as they are.
    """
    every = list(heads)
    starts: dict[str, Calibrated] = {}
    before = copy_state(trained)
    for unit in dict.fromkeys(units) if units else (None,):
        load_state(trained, before)
        for each in every:
            if unit is not None and isinstance(each, Thresholds) and each.unit != unit:
                each.set_unit(unit, WIDTHS[unit])
        prefix = f"{unit}_" if units is not None and len(set(units)) > 1 else ""
        found = _measure_starts(wanted, model, batches[:CALIBRATION], kept, teacher, exam, every, trained, fixed)
        starts |= {f"{prefix}{name}": start for name, start in found.items()}
    return starts


def _measure_starts(
    wanted: Sequence[Start],
    model: nn.Module,
    batches: Sequence[Any],
    kept: float,
    teacher: Teacher,
    exam: HeldOut,
    heads: Sequence[HeadOffsets],
    trained: Sequence[nn.Module],
    fixed: Sequence[nn.Module],
) -> dict[Start, Calibrated]:
    """Calibrate from each start and measure it, in the unit that thresholds have."""
    headroom = None
    starts: dict[Start, tuple[Measurement, Values]] = {}
    before = copy_state(fixed)
    thresholds = [each for each in heads if isinstance(each, Thresholds)]

    def measure(start: Start) -> None:
        settle(heads, exam.measure_kept, kept)
        starts[start] = (exam.measure(), copy_state(trained))

    for _ in range(2 if thresholds else 0):  # deep layers are calibrated behind sparse ones
        calibrate(model, batches, kept, forward=teacher.run)
        load_state(fixed, before)
    for each in heads:
        if not isinstance(each, Thresholds):
            torch.nn.init.zeros_(each.offset)
    greedy = "greedy" in wanted and len(batches) > 1 and kept >= LEVELS[0]
    valued = "value" in wanted and thresholds
    if "share" in wanted or not (greedy or valued):
        measure("share")
    if valued:
        _share_one_value(thresholds)
        measure("value")
    if greedy:
        allocation = allocate(model, batches, kept, forward=teacher.run, objective=teacher.objective)
        headroom = (allocation.gain, allocation.uncertainty)
        apply_shares(model, batches, allocation.shares, teacher.run)
        load_state(fixed, before)
        measure("greedy")
    return {name: Calibrated(*start, headroom) for name, start in starts.items()}


@torch.no_grad()
def _share_one_value(thresholds: Iterable[Thresholds]) -> None:
    """Give all heads the mean of their thresholds."""
    every = list(thresholds)
    mean = float(torch.cat([each.values() for each in every]).mean())
    for each in every:
        each.set_base(mean)
        each.offset.zero_()


def copy_state(modules: Sequence[nn.Module]) -> Values:
    return [{name: x.clone() for name, x in module.state_dict().items()} for module in modules]


def load_state(modules: Sequence[nn.Module], states: Values) -> None:
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
