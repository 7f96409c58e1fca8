"""Top-k with a trained factor of each head's number of keys."""

import pytest
import torch
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.topk.mechanism import TopK
from thresher.testing.inputs import Inputs, attend, draw, first, gradients

FACTORS = torch.tensor([0.5, 1.0, 2.5])


def build(pattern: Pattern, **hyperparameters: object) -> TopK:
    mechanism = TopK(3, 8, pattern, per_head=True, **hyperparameters)  # type: ignore[arg-type]
    with torch.no_grad():
        mechanism.factors.offset.copy_(FACTORS.log())  # type: ignore[union-attr]
    return mechanism


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tail", ["none", "mean"])
@pytest.mark.parametrize("keys", [2, 0.3], ids=str)
@pytest.mark.parametrize("pattern", Pattern)
def test_each_head_keeps_its_own_number_of_keys(pattern: Pattern, keys: float, tail: str, backend: str) -> None:
    mechanism = build(pattern, keys=keys, tail=tail, backend=backend)
    inputs = draw(mechanism, spread=1.5)
    m = inputs.k.shape[2]
    call = Call(keys=first([m, m - 3], m))
    with torch.no_grad():
        found = attend(mechanism, inputs, call)
        for head, factor in enumerate(FACTORS.tolist()):
            wanted_keys = int(keys * factor) if isinstance(keys, int) else min(keys * factor, 1.0)
            alone = TopK(3, 8, pattern, keys=max(wanted_keys, 1) if isinstance(keys, int) else wanted_keys, tail=tail)
            wanted = attend(alone, inputs, call)
            assert_close(found.out[:, head], wanted.out[:, head])
            assert torch.equal(found.cost.kept[:, head], wanted.cost.kept[:, head])
            assert torch.equal(found.cost.total[:, head], wanted.cost.total[:, head])


@pytest.mark.parametrize("tail", ["none", "mean"])
@pytest.mark.parametrize("pattern", Pattern)
def test_outputs_and_gradients_of_tokens_do_not_depend_on_whether_factors_are_trained(
    pattern: Pattern, tail: str
) -> None:
    mechanism = build(pattern, keys=0.3, tail=tail, chunk=3)
    inputs = draw(mechanism, spread=1.5)
    trained, found = gradients(mechanism, inputs, Call())
    mechanism.factors.requires_grad_(False)  # type: ignore[union-attr]
    fixed, wanted = gradients(mechanism, inputs, Call())
    assert_close(trained.out, fixed.out)
    assert_close(trained.cost.kept, fixed.cost.kept)
    for name, reference in wanted.items():
        assert_close(found[name], reference)


def test_the_gradient_of_a_factor_is_that_of_a_step_as_wide_as_its_ranks() -> None:
    """With values that say which rank they have, the gradient is the slope of the gate at each rank."""
    mechanism = TopK(1, 1, Pattern.NONCAUSAL_CROSS, keys=8, tail="none", per_head=True)
    m = 64
    k = torch.linspace(1, 0, m, dtype=torch.float64).reshape(1, 1, m, 1) * 1e-9  # equal scores but for their order
    v = torch.eye(m, dtype=torch.float64)[None, None]
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    attended = mechanism(q, k, v, Call())
    out = attended.out[0, 0, 0]
    assert_close(out[:8], torch.full((8,), 1 / 8, dtype=torch.float64))
    assert mechanism.factors is not None
    slopes = [torch.autograd.grad(out[j], mechanism.factors.offset, retain_graph=True)[0] for j in (7, 8, 9, 40)]
    assert slopes[1] > slopes[2] > slopes[3]
    (of_dropped,) = torch.autograd.grad(out[8:].sum(), mechanism.factors.offset, retain_graph=True)
    assert 0.5 < float(of_dropped) < 1, "1 % more keys give about 1 % of the weight to those that follow"
    (of_kept,) = torch.autograd.grad(attended.cost.kept.sum(), mechanism.factors.offset)
    assert float(of_kept) == 8


def test_the_kernel_refuses_training_and_serves_the_rest() -> None:
    mechanism = build(Pattern.NONCAUSAL_SELF, backend="cpu")
    inputs: Inputs = draw(mechanism)
    with pytest.raises(ValueError, match="no gradient of the factors of heads"):
        attend(mechanism, inputs, Call())
    with torch.no_grad():
        attend(mechanism, inputs, Call())


def test_state_has_factors_only_where_they_are_asked_for() -> None:
    assert not TopK(2, 8, Pattern.NONCAUSAL_SELF, tail="none").state_dict()
    assert list(TopK(2, 8, Pattern.NONCAUSAL_SELF, tail="none", per_head=True).state_dict()) == ["factors.offset"]


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float64).min], ids=["infinite", "lowest"])
def test_biases_that_hide_keys_leave_gradients_finite(hidden: float) -> None:
    mechanism = build(Pattern.NONCAUSAL_SELF, keys=0.3, tail="none")
    inputs = draw(mechanism)
    n = inputs.q.shape[2]
    bias = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(torch.ones(n, n).triu(1).bool(), hidden)
    found = attend(mechanism, inputs, Call(bias=bias))
    with torch.no_grad():
        assert_close(found.out.detach(), attend(mechanism, inputs, Call(bias=bias)).out)
    found.out.sum().backward()
    assert mechanism.factors is not None
    assert mechanism.factors.offset.grad is not None
    assert mechanism.factors.offset.grad.isfinite().all()
