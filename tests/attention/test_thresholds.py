"""Thresholds: a gate that never closes on the best key, and gradients that can always bring a threshold back."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.attention.latte_reference import step_of
from thresher.attention.shared.functional import clamp_from_below
from thresher.attention.shared.thresholds import Thresholds
from thresher.testing.inputs import first, noise_like


def thresholds(*values: float, tau: float = 0.5, trainable: bool = True) -> Thresholds:
    made = Thresholds(len(values), initial=0.0, tau=tau, trainable=trainable).double()
    made.base.copy_(torch.tensor(values))
    return made


def differences(b: int = 2, h: int = 3, n: int = 4, m: int = 6) -> Tensor:
    scores = noise_like(torch.empty(b, h, n, m, dtype=torch.float64), 3.0)
    return scores.amax(-1, keepdim=True) - scores


def climb(bound: object, start: float, steps: int = 20) -> float:
    """Minimise (2 - bound(x))^2 from `start` by gradient descent; return where x ends."""
    x = torch.tensor([start], requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad((2 - bound(x)).square().sum(), x)  # type: ignore[operator]
        x = (x - 0.3 * gradient).detach().requires_grad_()
    return x.item()


def test_a_bounded_value_below_the_bound_can_climb_back() -> None:
    assert climb(lambda x: clamp_from_below(x, 0.0), start=-3.0) == pytest.approx(2, abs=1e-3)


def test_under_a_plain_clamp_it_could_not() -> None:
    assert climb(lambda x: x.clamp_min(0.0), start=-3.0) == -3.0


def test_a_bounded_value_below_the_bound_falls_no_further() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    bounded = clamp_from_below(x, 0.0)
    assert bounded.tolist() == [0, 0, 1]
    (downwards,) = torch.autograd.grad(bounded.sum(), x, retain_graph=True)
    assert downwards.tolist() == [0, 1, 1]
    (upwards,) = torch.autograd.grad(-bounded.sum(), x)
    assert upwards.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("offset", [-2.0, 0.0])
def test_a_threshold_at_zero_can_be_raised_again(offset: float) -> None:
    gate = thresholds(0.0)
    with torch.no_grad():
        gate.offset.fill_(offset)
    difference = differences(h=1)
    optimiser = torch.optim.Adam([gate.offset], lr=0.2)
    before = gate(difference, None).kept.sum()
    for _ in range(60):
        optimiser.zero_grad()
        (0.5 - gate(difference, None).kept.sum() / difference.numel()).square().backward()
        optimiser.step()
    assert gate(difference, None).kept.sum() > before
    assert gate.values().item() > 0.1


def test_theta_is_base_plus_offset_and_never_negative() -> None:
    gate = thresholds(1.0, 2.0, 0.5)
    with torch.no_grad():
        gate.offset.copy_(torch.tensor([0.25, -1.0, -4.0]))
    assert gate.values().tolist() == [1.25, 1.0, 0.0]


def test_exactly_the_differences_up_to_theta_are_kept() -> None:
    gate = thresholds(0.0, 1.5, 4.0)
    difference = differences()
    difference[:, 1, :, 0] = 1.5
    keep, _, kept, _ = gate(difference, None)
    for head, theta in enumerate((0.0, 1.5, 4.0)):
        assert torch.equal(keep[:, head], difference[:, head] <= theta)
    assert keep[:, 1, :, 0].all()
    assert torch.equal(kept, keep.sum((-2, -1)).double())


def test_the_best_key_of_a_row_stays_at_the_smallest_threshold() -> None:
    keep = thresholds(0.0, 0.0, 0.0)(differences(), None).keep
    assert (keep.sum(-1) == 1).all()


def test_hidden_pairs_are_never_kept_nor_counted_whatever_their_difference() -> None:
    visible = first([3, 1], 6)[:, None, None, :]
    gate = thresholds(1.0, 2.0, math.inf)
    wanted = gate(differences(), visible)
    for junk in (-5.0, 0.0, math.inf, -math.inf, math.nan):
        got = gate(differences().masked_fill(~visible, junk), visible)
        assert torch.equal(got.keep, wanted.keep)
        assert torch.equal(got.kept, wanted.kept)
        assert torch.equal(got.slope, wanted.slope)
        assert (got.slope.masked_select(~visible) == 0).all()


def test_leading_keys_are_always_kept_where_visible_and_take_no_part_in_training() -> None:
    visible = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    visible[1, ..., 0] = False
    keep, slope, kept, _ = thresholds(0.0, 0.0, 0.0)(differences(), visible, always_keep=2)
    assert keep[0, ..., :2].all()
    assert keep[1, ..., 1].all()
    assert not keep[1, ..., 0].any()
    assert not slope[..., :2].any()
    assert torch.equal(kept, keep.sum((-2, -1)).double())


def test_more_leading_keys_than_there_are_keep_everything() -> None:
    assert thresholds(0.0, 0.0, 0.0)(differences(), None, always_keep=99).keep.all()


@pytest.mark.parametrize("surrogate", ["sigmoid", "compact", "inside"])
def test_the_gradient_of_the_count_is_that_of_a_smooth_step(surrogate: str) -> None:
    gate, difference = thresholds(0.5, 2.0, 4.0, tau=0.7), differences()
    gate.surrogate = surrogate  # type: ignore[assignment]
    visible = first([6, 4], 6)[:, None, None, :]
    kept = gate(difference, visible).kept
    theta = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    soft = step_of(theta[:, None, None] - difference, gate.tau, surrogate) * visible
    weight = noise_like(kept)
    (wanted,) = torch.autograd.grad((soft.sum((-2, -1)) * weight).sum(), theta)
    (got,) = torch.autograd.grad((kept * weight).sum(), gate.offset)
    assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_differences_receive_no_gradient() -> None:
    difference = differences().requires_grad_()
    gate = thresholds(0.5, 2.0, 4.0)(difference, None)
    (got,) = torch.autograd.grad(gate.kept.sum() + gate.threshold.sum(), difference, allow_unused=True)
    assert got is None


def test_no_surrogate_is_computed_when_none_is_wanted() -> None:
    gate, difference = thresholds(0.5, 2.0, 4.0), differences()
    with torch.no_grad():
        assert gate(difference, None).slope is None
    frozen = gate(difference, None, surrogate=False)
    assert frozen.slope is None
    assert not frozen.kept.requires_grad
    assert torch.equal(frozen.keep, gate(difference, None).keep)


def test_an_infinite_threshold_keeps_everything_and_trains_without_nan() -> None:
    gate = thresholds(math.inf, math.inf, math.inf)
    keep, slope, kept, _ = gate(differences(), None)
    assert keep.all()
    (gradient,) = torch.autograd.grad(kept.sum(), gate.offset)
    assert (gradient == 0).all()
    assert (slope == 0).all()


def test_a_threshold_far_from_every_difference_gets_a_zero_gradient_and_not_none() -> None:
    gate = thresholds(400.0, 400.0, 400.0)
    gate(differences(), None).kept.sum().backward()
    assert gate.offset.grad is not None
    assert (gate.offset.grad == 0).all()


def test_untrainable_thresholds_have_no_trainable_parameter() -> None:
    gate = thresholds(0.5, 2.0, 4.0, trainable=False)
    assert not any(p.requires_grad for p in gate.parameters())
    assert not gate(differences(), None).kept.requires_grad


def test_thresholds_are_fp32_and_have_a_dimension() -> None:
    made = Thresholds(3, initial=1.0, tau=0.5, trainable=True)
    assert made.offset.shape == (3,)
    assert made.offset.dtype == made.base.dtype == torch.float32


def test_another_length_moves_theta_by_the_logarithm_of_the_ratio() -> None:
    gate = thresholds(1.0, 2.0)
    gate.transfer_length(64, 128)
    assert_close(gate.values(), torch.tensor([1.0, 2.0], dtype=torch.float64) + math.log(2))
    gate.transfer_length(128, 64)
    assert_close(gate.values(), torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_a_dense_threshold_stays_dense_at_another_length() -> None:
    gate = thresholds(math.inf)
    gate.transfer_length(64, 8)
    assert gate.values().item() == math.inf


@pytest.mark.parametrize(("old", "new"), [(0, 8), (8, 0), (-1, 8)])
def test_lengths_below_one_are_refused(old: int, new: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {old} and {new}"):
        thresholds(1.0).transfer_length(old, new)


@pytest.mark.parametrize("initial", [-0.1, -math.inf, math.nan])
def test_a_threshold_below_zero_or_without_a_value_is_refused(initial: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0; got {initial}"):
        Thresholds(2, initial=initial, tau=0.5, trainable=True)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_surrogate_without_width_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=f"above 0; got {tau}"):
        Thresholds(2, initial=1.0, tau=tau, trainable=True)


def test_evaluation_has_a_base_of_its_own() -> None:
    made = Thresholds(2, initial=1.0, tau=0.5, trainable=True)
    made.set_base(torch.tensor([2.0, math.nan]))
    assert made.values().tolist() == made.eval().values().tolist() == [2.0, 1.0]
    made.eval_base.fill_(3.0)
    assert made.values().tolist() == [3.0, 3.0]
    assert made.train().values().tolist() == [2.0, 1.0]
