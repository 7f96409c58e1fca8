"""Budgets of pairs allocated to heads by sensitivity."""

import pytest
import torch
from torch import Tensor

from tests.budget.test_tuning import build, draw_batches
from thresher import ComputeMeter, sparsify
from thresher.attention.mechanism import dense_attention
from thresher.budget.allocation import LEVELS, allocate, allocate_greedily, apply_shares, predict_error
from thresher.budget.objectives import measure_error, project

KEPT = 0.25
MECHANISMS = [
    {"attention": "latte", "tail": "none"},
    {"attention": "latte", "tail": "mean"},
    {"attention": "topk", "tail": "none", "per_head": True},
]


def curves(*scales: float) -> Tensor:
    """Build convex curves of error over the share kept, zero at 1."""
    levels = torch.tensor(LEVELS)
    return torch.stack([scale * (1 / levels - 1) for scale in scales])


def test_greedy_shares_meet_the_budget_and_beat_all_others() -> None:
    errors = curves(1.0, 4.0, 0.01, 0.5)
    shares = allocate_greedily(errors, KEPT)
    assert float(shares.mean()) == pytest.approx(KEPT)
    assert shares.argsort().tolist() == [2, 3, 0, 1]
    best = predict_error(errors, shares)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.rand(4, generator=generator)
        other = (other * KEPT * 4 / other.sum()).clamp(LEVELS[0], 1)
        if float(other.mean()) <= KEPT:
            assert predict_error(errors, other) >= best - 1e-5


def test_curves_that_are_not_convex_are_replaced_by_their_hull() -> None:
    flat = torch.zeros(1, len(LEVELS))
    flat[0, :5] = 1.0  # nothing is gained before half of the levels
    shares = allocate_greedily(torch.cat([flat, curves(1e-3)]), KEPT)
    assert float(shares.mean()) == pytest.approx(KEPT)
    assert float(shares[0]) >= LEVELS[5] - 1e-6, "one step to where the gain is"


@pytest.mark.parametrize("kind", ["error", "kl"])
def test_squared_changes_of_projections_are_the_error_on_average(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(6, 5, generator=generator).requires_grad_()
    change = 1e-3 * torch.randn(6, 5, generator=generator)
    squares = []
    for _ in range(4000):
        (gradient,) = torch.autograd.grad(project(wanted, None, kind, generator), wanted)  # type: ignore[arg-type]
        squares.append(float((gradient * change).sum() ** 2))
    with torch.no_grad():
        error = float(measure_error(wanted.double() + change, wanted.double(), None, kind))  # type: ignore[arg-type]
    assert sum(squares) / len(squares) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("hyperparameters", MECHANISMS, ids=["latte", "with a tail", "topk"])
def test_allocated_shares_err_less_than_equal_ones(hyperparameters: dict[str, object]) -> None:
    model, batches = build(**hyperparameters), draw_batches(18)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = allocate(model, batches[:16], KEPT)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    whole = torch.cat(list(found.shares.values()))
    assert float(whole.mean()) == pytest.approx(KEPT)
    assert 0 < found.error < found.uniform_error
    assert 0 < found.gain < 1
    assert f"{found.gain:.0%}" in str(found)

    def measure(shares: dict[str, Tensor]) -> tuple[float, float]:
        model.eval()
        apply_shares(model, batches[:16], shares)
        meter, errors = ComputeMeter(model), []
        with torch.no_grad():
            for batch in batches[16:]:
                with dense_attention():
                    wanted = model(batch)
                with meter:
                    errors.append(float(measure_error(model(batch), wanted, batch, "error")))
        return sum(errors) / len(errors), float(meter.kept())

    error, kept = measure(found.shares)
    equal, _ = measure({name: torch.full_like(each, KEPT) for name, each in found.shares.items()})
    assert error < equal
    assert kept == pytest.approx(KEPT, abs=0.05)


def test_no_headroom_is_said() -> None:
    model = build(attention="latte")
    found = allocate(model, draw_batches(2), 0.99)
    assert ("cannot pay" in str(found)) == (found.gain <= found.uncertainty)


def test_bad_input_is_one_sentence() -> None:
    model = build(attention="latte")
    with pytest.raises(ValueError, match="at least two batches"):
        allocate(model, draw_batches(1), KEPT)
    with pytest.raises(ValueError, match=r"between 0\.01 and 1, got 2"):
        allocate(model, draw_batches(2), 2)
    plain = build()
    with pytest.raises(ValueError, match="no thresholds to allocate"):
        allocate(plain, draw_batches(2), KEPT)
    sparsify(plain, "topk")
    with pytest.raises(ValueError, match="no thresholds to allocate"):
        allocate(plain, draw_batches(2), KEPT)


def test_heads_with_more_pairs_weigh_more() -> None:
    errors, pairs = curves(1.0, 1.0), torch.tensor([900.0, 100.0])
    shares = allocate_greedily(errors, KEPT, pairs)
    assert float((shares * pairs).sum() / pairs.sum()) == pytest.approx(KEPT)
    assert shares[1] > shares[0], "the same gain for a ninth of the pairs"


@pytest.mark.parametrize("hyperparameters", MECHANISMS[1:], ids=["latte", "topk"])
def test_a_mechanism_that_does_not_reach_the_output_gets_the_least(hyperparameters: dict[str, object]) -> None:
    model, batches = build(**hyperparameters), draw_batches(3)

    def run(batch: Tensor) -> Tensor:
        model(batch)
        return model.blocks[0](model.patch_embed(batch))

    found = allocate(model, batches, KEPT, forward=run)
    first, second = found.shares.values()
    assert float(second.mean()) == pytest.approx(LEVELS[0])
    pairs = (17**2 + 16**2, 17**2)  # the first block runs twice, once without the class token
    kept = sum(float(shares.mean()) * number for shares, number in zip((first, second), pairs, strict=True))
    assert kept / sum(pairs) == pytest.approx(KEPT, rel=0.01)
