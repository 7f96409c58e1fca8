"""A tuning chooses the unit of thresholds by the error of its starts, and goes on in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.budget.test_tuning import KEPT, LATTE, build, draw_batches, tune_quickly
from thresher import inject, sparsify
from thresher.attention.latte.mechanism import Latte
from thresher.attention.shared.thresholds import Thresholds, named_thresholds
from thresher.budget import tuning
from thresher.budget.tuning import LEARNING_RATES, tune

BOTH = ("spread", "nats")


def list_thresholds(model: nn.Module) -> list[Thresholds]:
    return [each for _, each in named_thresholds(model)]


def get_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def test_the_start_that_errs_least_of_all_units_is_taken() -> None:
    alone = {unit: tune_quickly(build(**LATTE, tail="mean"), steps=0, units=[unit]) for unit in BOTH}
    model = build(**LATTE, tail="mean")
    found = tune_quickly(model, steps=0, units=BOTH)
    assert found.starts == {f"{u}_{name}": each for u, one in alone.items() for name, each in one.starts.items()}
    assert len(found.starts) == 6
    best = min(BOTH, key=lambda unit: alone[unit].tuned.error)
    assert alone["spread"].tuned.error != alone["nats"].tuned.error
    assert found.unit == best
    assert found.tuned == alone[best].tuned
    assert found.headroom == alone[best].headroom
    for name, values in found.thresholds.items():
        assert torch.equal(values, alone[best].thresholds[name])
    assert {each.unit for each in list_thresholds(model)} == {best}
    assert {bool(each.in_spreads) for each in list_thresholds(model)} == {best == "spread"}


@pytest.mark.parametrize(("unit", "other", "usual"), [("spread", "nats", 0.35), ("nats", "spread", 0.1)])
def test_one_unit_has_plain_names_and_a_width_of_its_own(unit: str, other: str, usual: float) -> None:
    gate = {"surrogate": "inside", "tau": 0.2}
    model = build(attention="latte", unit=unit, gate=gate)
    found = tune_quickly(model, steps=0, units=[unit])
    assert set(found.starts) == {"share", "value", "greedy"}
    assert {float(each.tau) for each in list_thresholds(model)} == {float(torch.tensor(0.2))}, "the user's own"
    found = tune_quickly(model, steps=0, units=[other], starts=("share",))
    assert set(found.starts) == {"share"}
    assert found.unit == other
    assert {each.unit for each in list_thresholds(model)} == {other}
    assert {float(each.tau) for each in list_thresholds(model)} == {float(torch.tensor(usual))}
    assert found.tuned.kept == pytest.approx(KEPT, rel=0.02)


def test_without_units_thresholds_keep_theirs() -> None:
    model = build(attention="latte", unit="nats")
    assert tune_quickly(model, steps=0).unit is None
    assert {each.unit for each in list_thresholds(model)} == {"nats"}


@pytest.mark.parametrize("unit", BOTH)
def test_learning_rates_are_those_of_the_chosen_unit(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    made: Any = tuning._build_optimizer

    def build_optimizer(*args: Any) -> Any:
        optimizer, schedule = made(*args)
        rates.append(optimizer.param_groups[0]["initial_lr"])
        return optimizer, schedule

    monkeypatch.setattr(tuning, "_build_optimizer", build_optimizer)
    tune_quickly(build(attention="latte", unit="spread"), steps=0, units=[unit])
    assert rates == [LEARNING_RATES[unit]]


@pytest.mark.parametrize("unit", BOTH)
def test_a_tuning_in_another_unit_continues_from_its_file_as_if_unbroken(unit: str, tmp_path: Path) -> None:
    file = tmp_path / "tuning.pt"
    built = "nats" if unit == "spread" else "spread"
    options: dict[str, Any] = {"steps": 6, "evaluate_every": 2, "units": [unit], "starts": ("share",)}
    latte: dict[str, Any] = LATTE | {"unit": built, "tail": "mean"}
    whole = tune_quickly(build(**latte), **options)

    def stop(step: int, measured: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    model = build(**latte)
    before = get_state(model)
    with pytest.raises(KeyboardInterrupt):
        tune_quickly(model, **options, state_file=file, on_step=stop)
    assert {each.unit for each in list_thresholds(model)} == {built}, "an interrupt gives the unit back"
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model = build(**latte)
    found = tune_quickly(model, **options, state_file=file)
    assert (found.history, found.tuned, found.starts, found.unit) == (whole.history, whole.tuned, whole.starts, unit)
    for name, values in whole.thresholds.items():
        assert torch.equal(found.thresholds[name], values)
    assert {each.unit for each in list_thresholds(model)} == {unit}
    with pytest.raises(ValueError, match="of a tuning with another units"):
        tune_quickly(build(**latte), **options | {"units": BOTH}, state_file=file)


def test_frozen_thresholds_keep_their_unit() -> None:
    model = build(**LATTE)
    frozen = model.blocks[0].attn.mechanism.thresholds
    frozen.offset.requires_grad_(False)
    before = {name: x.clone() for name, x in frozen.state_dict().items()}
    tune_quickly(model, kept=0.6, steps=0, units=["nats"], starts=("share",))
    assert [each.unit for each in list_thresholds(model)] == ["spread", "nats"]
    assert all(torch.equal(x, before[name]) for name, x in frozen.state_dict().items())


class InNats(Latte):
    """A mechanism of somebody's own whose thresholds have one unit."""

    def __init__(self, num_heads: int, head_dim: int, pattern: Any, *, threshold: float = 6.9) -> None:
        super().__init__(num_heads, head_dim, pattern, threshold=threshold, unit="nats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention": "topk", "per_head": True},
            "blocks.0.attn.mechanism is topk, which counts in factors of its number",
        ),
        ({"attention": InNats}, "which counts in nats alone: leave units out"),
    ],
    ids=["topk", "nats"],
)
def test_mechanisms_without_a_choice_of_units_are_refused(changes: dict[str, Any], message: str) -> None:
    model = build()
    if changes["attention"] == "topk":
        sparsify(model, **changes)
    else:
        inject(model, changes["attention"])
    with pytest.raises(ValueError, match=message):
        tune_quickly(model, units=BOTH)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["nat"], "units must be one of nats, spread; got 'nat'"),
        ("nats", "units must be null or a list with any of nats, spread; got 'nats'"),
        ([], "units must be null or a list with any of nats, spread; got"),
    ],
    ids=str,
)
def test_wrong_units_are_refused(units: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(build(**LATTE), draw_batches(4), KEPT, units=units)
