"""The unit of thresholds is part of their state, and mechanisms read it there."""

import copy
from typing import Any

import pytest
import torch

from thresher.attention.blocks import Blocks
from thresher.attention.contract import Call, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.attention.shared.thresholds import IN_SPREADS, Thresholds
from thresher.kernels.build import can_use
from thresher.testing.inputs import noise_like

BOTH = ("spread", "nats")
QKV = [noise_like(torch.empty(2, 4, 24, 8), 1.5, seed=seed) for seed in range(3)]


def latte(unit: Any, **options: Any) -> Latte:
    gate = {"surrogate": "compact", "tau": 0.3}
    return Latte(4, 8, Pattern.NONCAUSAL_SELF, **{"threshold": 0.7, "unit": unit, "gate": gate} | options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("unit", "other"), [BOTH, BOTH[::-1]])
def test_a_mechanism_that_takes_another_unit_is_as_one_built_in_it(unit: Any, other: Any, backend: str) -> None:
    if backend == "cpu" and not can_use("latte"):
        pytest.skip("there is no C++ compiler that builds the kernel")
    built, switched = latte(unit, backend=backend), latte(other, backend=backend, gate={"surrogate": "compact"})
    before = switched(*QKV, Call()).out
    switched.thresholds.set_unit(unit, 0.3)
    gradients = []
    for mechanism in (built, switched):
        attended = mechanism(*QKV, Call())
        (attended.out.square().sum() + attended.cost.kept.sum()).backward()
        gradients.append(mechanism.thresholds.offset.grad)
        assert torch.equal(attended.out, built(*QKV, Call()).out)
    assert not torch.equal(before, attended.out)
    assert torch.equal(gradients[0], gradients[1])
    assert f"unit={unit}" in repr(switched)


def test_states_bring_the_unit_with_them() -> None:
    source, target = latte("nats"), latte("spread")
    target.load_state_dict(source.state_dict(), strict=True)
    assert target.thresholds.unit == "nats"
    assert torch.equal(target(*QKV, Call()).out, source(*QKV, Call()).out)
    target.load_state_dict(latte("spread").state_dict(), assign=True)
    assert target.thresholds.unit == "spread"
    assert copy.deepcopy(source).thresholds.unit == "nats"
    assert source.bfloat16().thresholds.in_spreads.dtype is torch.bool


def test_a_unit_alone_is_no_state_of_thresholds() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        latte("nats").load_state_dict({f"thresholds.{IN_SPREADS}": torch.tensor(True)}, strict=True)


def test_thresholds_on_the_meta_device_read_their_unit_later() -> None:
    with torch.device("meta"):
        thresholds = Thresholds(2, initial=1.0, tau=0.5, trainable=True, unit="spread")
    state = Thresholds(2, initial=1.0, tau=0.5, trainable=True).state_dict()
    thresholds.read_unit()
    assert thresholds.unit == "spread"
    thresholds.load_state_dict(state, assign=True)
    assert thresholds.unit == "nats"
    thresholds.in_spreads = torch.tensor(1.0)  # as a loader in fp32 leaves it
    thresholds.read_unit()
    assert thresholds.unit == "spread"
    assert thresholds.in_spreads.dtype is torch.bool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nat", 0.1), "unit must be one of nats, spread; got 'nat'"),
        (("nats", 0.0), "tau must be a finite number above"),
    ],
)
def test_wrong_units_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latte("nats").thresholds.set_unit(*arguments)


@pytest.mark.parametrize("unit", BOTH)
def test_blocks_that_vote_read_the_unit_there_too(unit: Any) -> None:
    other = next(each for each in BOTH if each != unit)
    options: dict[str, Any] = {"threshold": 0.7, "block": {"queries": 4}}
    built, switched = (Blocks(4, 8, Pattern.NONCAUSAL_SELF, unit=each, **options) for each in (unit, other))
    before = switched(*QKV, Call()).out
    switched.thresholds.set_unit(unit, 0.3)
    assert torch.equal(switched(*QKV, Call()).out, built(*QKV, Call()).out)
    assert not torch.equal(before, built(*QKV, Call()).out)
