"""Budgets: what they aim at, what they cost, and what they refuse."""

import itertools

import pytest
import torch

from thresher.budget.budgets import Budget, Lagrangian, Penalty, Target


def ratio(value: float, trainable: bool = True) -> torch.Tensor:
    return torch.tensor(value, requires_grad=trainable)


def test_the_aim_is_dense_then_cubic_then_the_target() -> None:
    budget = Target(target=0.2, start=0.1, end=0.6, margin=0.0)
    assert budget.aim(0.0) == budget.aim(0.1) == 1.0
    assert budget.aim(0.35) == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert budget.aim(0.6) == pytest.approx(0.2)
    assert budget.aim(1.0) == pytest.approx(0.2)
    aims = [budget.aim(i / 50) for i in range(51)]
    assert all(a >= b for a, b in itertools.pairwise(aims))  # type: ignore[operator]


def test_a_target_may_hold_from_the_first_step_or_from_any_other() -> None:
    budget = Target(target=0.2, start=0.0, end=0.0, margin=0.0)
    assert budget.aim(0.0) == budget.aim(1.0) == pytest.approx(0.2)
    assert float(budget.loss(ratio(0.3, trainable=False), 0.0)) == pytest.approx(0.1)
    later = Target(target=0.2, start=0.5, end=0.5, margin=0.0)
    assert later.aim(0.49) == 1.0
    assert later.aim(0.5) == pytest.approx(0.2)


def test_training_aims_below_the_bound_by_the_margin() -> None:
    assert Target(target=0.2, margin=0.05).aim(1.0) == pytest.approx(0.19)


def test_target_pulls_from_both_sides_and_not_during_the_dense_start() -> None:
    budget = Target(target=0.2, weight=10, margin=0.0)
    for value, sign in ((0.3, 1), (0.1, -1)):
        r = ratio(value)
        budget.loss(r, 1.0).backward()
        assert r.grad is not None
        assert float(r.grad) == pytest.approx(20 * (value - 0.2))
        assert float(r.grad.sign()) == sign
    r = ratio(0.3)
    budget.loss(r, 0.05).backward()
    assert r.grad is not None
    assert float(r.grad) == 0


def test_penalty_is_linear_after_its_start() -> None:
    budget = Penalty(weight=2.0, start=0.1)
    half = ratio(0.5, trainable=False)
    assert float(budget.loss(half, 0.05)) == 0
    assert float(budget.loss(half, 0.5)) == 1.0


def test_lagrangian_raises_its_price_until_the_target_holds_and_lowers_it_below() -> None:
    budget = Lagrangian(target=0.2, rate=0.5, margin=0.0)
    for _ in range(3):
        budget.update(ratio(0.4), 1.0)
    assert float(budget.multiplier) == pytest.approx(0.3)
    for _ in range(10):
        budget.update(ratio(0.1), 1.0)
    assert float(budget.multiplier) < 0
    r = ratio(0.1)
    budget.loss(r, 1.0).backward()
    assert r.grad is not None
    assert float(r.grad) < 0, "below the target it must pay for compute"
    assert "multiplier" in budget.state_dict()


def test_lagrangian_alone_settles_a_quantity_that_a_task_pulls_at() -> None:
    budget = Lagrangian(target=0.2, rate=0.1, start=0.0, end=0.5, margin=0.0)
    x = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.5)
    for step in range(400):
        r = x.sigmoid()
        loss = budget.loss(r, step / 400) - 0.5 * r
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.update(r.detach(), step / 400)
    assert x.sigmoid().item() == pytest.approx(0.2, abs=0.02)


def test_a_budget_that_cannot_be_trained_is_refused_unless_auto() -> None:
    for budget in (Target(), Lagrangian(), Penalty()):
        with pytest.raises(ValueError, match=r"attention=topk.*compute=free"):
            budget.settle(ratio(1.0, trainable=False), "topk")
    auto = Target(required=False)
    assert "no compute budget" in auto.settle(ratio(1.0, trainable=False), "topk")
    assert auto.aim(1.0) is None
    assert float(auto.loss(ratio(1.0, trainable=False), 1.0)) == 0
    assert "at most 0.15" in Target(required=False).settle(ratio(1.0), "latte")


def test_calibrated_thresholds_follow_a_target_without_gradient() -> None:
    budget = Target()
    budget.hold_by_calibration()
    assert "annealed" in budget.settle(ratio(1.0, trainable=False), "latte")


def test_free_measures_only() -> None:
    budget = Budget()
    assert budget.aim(0.5) is None
    assert float(budget.loss(ratio(0.5, trainable=False), 0.5)) == 0
    assert "measured only" in budget.settle(ratio(1.0, trainable=False), "dense")


NAN, INF = float("nan"), float("inf")
NUMBERS = {  # what each number of a budget must be, and what it cannot be
    "target": (Target, "compute.target", (0, -0.1, 1.5, NAN, INF, -INF, "0.1", None, True)),
    "weight": (Target, "compute.weight", (0, -1, NAN, INF, "10", None, True)),
    "margin": (Target, "compute.margin", (-0.1, 1, 1.5, NAN, INF, "0", None, False)),
    "start": (Target, "compute.start", (-0.1, 1.1, NAN, INF, "0", None, False)),
    "end": (Target, "compute.end", (0.05, 1.1, NAN, -INF, "1", None, True)),
    "required": (Target, "compute.required", (1, 0, "true", None)),
    "quantity": (Target, "compute.quantity", ("flops", None, 1)),
    "rate": (Lagrangian, "compute.rate", (0, -1, NAN, INF, "0.1", None, True)),
}


@pytest.mark.parametrize("option", NUMBERS)
def test_values_out_of_range_are_refused_by_name(option: str) -> None:
    make, name, wrong = NUMBERS[option]
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            make(**{option: value})


@pytest.mark.parametrize("make", [Lagrangian, Penalty])
def test_other_budgets_check_what_they_share(make: type[Budget]) -> None:
    for option in ("weight", "start", "quantity"):
        for value in NUMBERS[option][2]:
            with pytest.raises(ValueError, match=NUMBERS[option][1]):
                make(**{option: value})


def test_bounds_that_are_allowed() -> None:
    assert Target(target=1, margin=0, start=0, end=1, weight=1e-9).aim(1.0) == 1
    assert Penalty(start=1.0).start == 1
