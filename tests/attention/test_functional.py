"""The arithmetic that mechanisms share, against the same arithmetic written out."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention.shared.functional import (
    MAX_EXCESS,
    attach_slope,
    expand_heads,
    gated_softmax,
    masked_softmax,
    straight_through,
)
from thresher.testing.inputs import noise_like

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(shape, dtype=torch.float64), seed=seed)


def test_heads_are_shared_in_consecutive_groups() -> None:
    x = torch.arange(2.0)[None, :, None, None]
    assert expand_heads(x, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert expand_heads(x, 2) is x


def test_heads_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        expand_heads(torch.zeros(1, 2, 1, 1), 5)


def test_masked_softmax_is_the_softmax_of_the_visible_keys() -> None:
    scores, visible = randn(2, 2, 3, 5) * 4, randn(2, 1, 3, 5, seed=1) > -0.5
    visible[..., 0] = True
    weights = masked_softmax(scores, visible)
    for x, y, i in itertools.product(range(2), range(2), range(3)):
        seen = visible[x, 0, i]
        assert_close(weights[x, y, i, seen], scores[x, y, i, seen].softmax(-1), atol=1e-15, rtol=1e-14)
        assert (weights[x, y, i, ~seen] == 0).all()


@pytest.mark.parametrize("hidden", [0.0, 1e300, float("inf"), float("-inf"), float("nan")])
def test_masked_softmax_gives_rows_without_a_key_zero_and_zero_gradient(hidden: float) -> None:
    """Whatever scores hidden pairs have: a soft gate, for one, leaves minus infinity there."""
    visible = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    visible[..., 1, :] = visible[..., 2, 2:] = False
    scores = randn(1, 1, 3, 4).masked_fill(~visible, hidden).requires_grad_()
    weights = masked_softmax(scores, visible)
    assert (weights[..., 1, :] == 0).all()
    (gradient,) = torch.autograd.grad((weights * randn(1, 1, 3, 4, seed=1)).sum(), scores)
    assert (gradient[~visible] == 0).all()
    assert gradient[visible].isfinite().all()
    assert gradient[..., 0, :].all()


def test_masked_softmax_without_a_mask_is_softmax() -> None:
    scores = randn(1, 2, 3, 4)
    assert torch.equal(masked_softmax(scores, None), scores.softmax(-1))


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    hard, soft = randn(5).requires_grad_(), randn(5, seed=1).requires_grad_()
    result = straight_through(hard.detach().round(), soft**2)
    assert_close(result, hard.round(), atol=1e-15, rtol=0)
    (gradient,) = torch.autograd.grad(result.sum(), soft)
    assert_close(gradient, 2 * soft)


@pytest.mark.parametrize("variable", [torch.tensor([0.3, 0.7]), torch.tensor([torch.inf, -torch.inf])])
def test_with_slope_has_the_value_and_the_slope_given_also_at_infinity(variable: Tensor) -> None:
    variable = variable.clone().requires_grad_()
    value, slope = torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = attach_slope(value, slope, variable)
    assert torch.equal(result, value)
    (gradient,) = torch.autograd.grad((result * torch.tensor([[1.0], [10.0]])).sum(), variable)
    assert gradient.tolist() == [31.0, 42.0]


def gate_written_out(scores: Tensor, theta: Tensor, keep: Tensor, slope: Tensor, into_scores: bool) -> Tensor:
    """A straight-through gate in front of the exponentials, for autograd; the row's best is a constant."""
    moves = theta - theta.detach()
    if into_scores:
        moves = moves + scores - scores.detach()
    gate = keep.double() + slope * moves
    best = scores.detach().masked_fill(~keep, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0)
    weights = gate * (scores - best).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def gate_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, theta = randn(2, 3, 4, 6) * 3, torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)[:, None, None]
    difference = scores.amax(-1, keepdim=True) - scores
    soft = ((theta - difference) / 0.7).sigmoid()
    return scores, theta, difference <= theta, soft * (1 - soft) / 0.7


@pytest.mark.parametrize("into_scores", [False, True])
def test_gated_softmax_equals_autograd_of_a_straight_through_gate(into_scores: bool) -> None:
    scores, theta, keep, slope = gate_inputs()
    results = []
    for function in (gated_softmax, gate_written_out):
        leaves = scores.clone().requires_grad_(), theta.clone().requires_grad_()
        weights = function(*leaves, keep, slope, into_scores)
        results.append((weights, *torch.autograd.grad((weights * randn(*weights.shape, seed=1)).sum(), leaves)))
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, atol=1e-14, rtol=1e-12)


def test_gated_softmax_has_the_closed_form_gradient() -> None:
    scores, theta, keep, slope = gate_inputs()
    theta.requires_grad_()
    weights = gated_softmax(scores, theta, keep, slope, False)
    upstream = randn(*weights.shape, seed=1)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), theta)
    for head in range(3):
        wanted = 0.0
        for x, i in itertools.product(range(2), range(4)):
            e = scores[x, head, i].exp()
            p = e * keep[x, head, i] / (e * keep[x, head, i]).sum()
            c = (p * upstream[x, head, i]).sum()
            wanted += (e / (e * keep[x, head, i]).sum() * (upstream[x, head, i] - c) * slope[x, head, i]).sum()
        assert_close(gradient[head, 0, 0], wanted, atol=1e-12, rtol=1e-12)


def test_gated_softmax_passes_scores_the_true_derivative_of_the_masked_softmax() -> None:
    scores, theta, keep, slope = gate_inputs()
    assert torch.autograd.gradcheck(lambda s: gated_softmax(s, theta, keep, slope, False), scores.requires_grad_())


def test_gated_softmax_leaves_rows_that_keep_nothing_at_zero() -> None:
    scores, theta, keep, slope = gate_inputs()
    keep[0, 1, 2], slope[0, 1, 2] = False, 0
    scores.requires_grad_()
    weights = gated_softmax(scores, theta, keep, slope, True)
    assert (weights[0, 1, 2] == 0).all()
    (gradient,) = torch.autograd.grad((weights * randn(*weights.shape, seed=1)).sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[0, 1, 2] == 0).all()


def test_a_dropped_key_that_outweighs_all_kept_ones_gives_a_finite_gradient() -> None:
    scores = torch.tensor([0.0, 500.0]).expand(1, 1, 1, 2).clone().requires_grad_()
    theta = torch.ones(1, 1, 1, requires_grad=True)
    keep, slope = torch.tensor([[[[True, False]]]]), torch.full((1, 1, 1, 2), 0.25)
    weights = gated_softmax(scores, theta, keep, slope, True)
    assert weights.flatten().tolist() == [1, 0]
    gradients = torch.autograd.grad((weights * torch.tensor([0.0, 1.0])).sum(), (scores, theta))
    wanted = 0.25 * torch.tensor(MAX_EXCESS).exp()
    assert_close(gradients[0].flatten(), torch.stack([torch.zeros(()), wanted]))
    assert_close(gradients[1].flatten()[0], wanted)
