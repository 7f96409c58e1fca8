"""LATTE at its edges: estimates, gradients, corners; references are plain PyTorch in fp64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.attention.latte_reference import (
    CAUSAL,
    SELF,
    difference_of,
    estimate_of,
    kept_by,
    latte,
    scales_of,
    scores_of,
    spread_by_definition,
    weights_of,
)
from thresher.attention import Call, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.testing.inputs import Inputs, attend, draw, first, gradients, noise_like, padded

# Estimates and scores


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
@pytest.mark.parametrize("split", ["round", "truncate"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_estimate_that_decides_is_the_product_of_the_top_bits(bits: int, split: str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": bits, "split": split}).eval()
    inputs = draw(mechanism, spread=1.5)
    visible = mechanism.visible(inputs.q, inputs.k, Call())
    difference = difference_of(estimate_of(inputs, bits, split, per_token=pattern.causal), visible)
    clear = (difference - 1.5).abs() > 1e-9
    assert torch.equal(kept_by(mechanism, inputs) & clear, (difference <= 1.5) & clear)
    exact = difference_of(scores_of(inputs), visible) <= 1.5
    assert bits == 8 or not torch.equal(kept_by(mechanism, inputs), exact)


def test_kept_keys_are_weighed_by_their_exact_scores_whatever_the_estimate() -> None:
    mechanism = latte(threshold=1.5, estimate={"bits": 2}).eval()
    inputs = draw(mechanism, spread=1.5)
    keep = kept_by(mechanism, inputs)
    wanted = scores_of(inputs).masked_fill(~keep, -torch.inf).softmax(-1)
    assert_close(weights_of(mechanism, inputs), wanted, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
@pytest.mark.parametrize("est_bits", [2, 4, 8, "exact"])
def test_int8_scores_are_the_products_of_the_8_bit_codes(est_bits: int | str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": est_bits, "scoring": "int8"}).eval()
    inputs = draw(mechanism, spread=1.5)
    scores, _ = mechanism.score(mechanism.prepare(inputs.q, inputs.k, inputs.v, Call()))
    scales = scales_of(inputs, pattern.causal)
    products = scores / (scales[0] * scales[1].transpose(-2, -1) * 8**-0.5)
    q_codes, k_codes = ((x / scale).round().long() for x, scale in zip((inputs.q, inputs.k), scales, strict=True))
    assert_close(products, (q_codes @ k_codes.transpose(-2, -1)).double(), atol=1e-9, rtol=0)
    keep = kept_by(mechanism, inputs)
    wanted = estimate_of(inputs, 8, per_token=pattern.causal).masked_fill(~keep, -torch.inf).softmax(-1)
    assert_close(weights_of(mechanism, inputs), wanted, atol=1e-12, rtol=1e-12)


def test_int8_scores_pass_gradients_straight_through() -> None:
    mechanism = latte(threshold=math.inf, estimate={"bits": 8, "scoring": "int8"})
    inputs = draw(mechanism)
    _, found = gradients(mechanism, inputs, cost=0)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    exact = scores_of(Inputs(*leaves))
    out = (exact + (estimate_of(inputs, 8) - exact).detach()).softmax(-1) @ leaves[2]
    for name, wanted in zip("qkv", torch.autograd.grad((out * noise_like(out)).sum(), leaves), strict=True):
        assert_close(found[name], wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_an_additive_bias_takes_part_in_the_choice_of_keys(est_bits: int | str) -> None:
    mechanism = latte(threshold=1.5, estimate={"bits": est_bits}).eval()
    inputs = draw(mechanism)
    bias = noise_like(torch.empty(1, 2, 7, 7).double(), 3.0)
    estimate = (scores_of(inputs) if est_bits == "exact" else estimate_of(inputs, 4)) + bias
    wanted = difference_of(estimate, torch.ones_like(estimate).bool()) <= 1.5
    assert torch.equal(kept_by(mechanism, inputs, Call(bias=bias)), wanted)
    assert not torch.equal(kept_by(mechanism, inputs), wanted)


@pytest.mark.parametrize("mode", ["ste", "soft", "hard"])
def test_training_with_a_hard_gate_computes_what_evaluation_does_and_a_soft_one_does_not(mode: str) -> None:
    mechanism = latte(threshold=1.5, gate={"mode": mode})
    inputs = draw(mechanism, spread=1.5)
    trained, evaluated = attend(mechanism.train(), inputs), attend(mechanism.eval(), inputs)
    assert torch.equal(trained.cost.kept, evaluated.cost.kept)
    assert torch.allclose(trained.out, evaluated.out, atol=1e-12) == (mode != "soft")
    assert torch.equal(kept_by(mechanism, inputs), kept_by(latte(threshold=1.5).eval(), inputs))


@pytest.mark.parametrize("mode", ["ste", "soft", "hard"])
def test_the_output_is_the_same_with_and_without_gradients(mode: str) -> None:
    """Checkpointed blocks run once without gradients and once with them."""
    mechanism = latte(threshold=1.5, gate={"mode": mode})
    inputs = draw(mechanism, spread=1.5)
    with torch.no_grad():
        without = attend(mechanism, inputs).out
    assert_close(attend(mechanism, inputs).out, without, atol=1e-12, rtol=1e-12)


def test_soft_mode_weighs_keys_by_their_gate() -> None:
    mechanism = latte(
        threshold=1.5, estimate={"bits": "exact"}, gate={"tau": 0.7, "mode": "soft", "into_scores": False}
    )
    inputs, call = draw(mechanism, spread=1.5), Call(keys=first([7, 4], 7))
    visible = mechanism.visible(inputs.q, inputs.k, call)
    gate = ((1.5 - difference_of(scores_of(inputs), visible)) / mechanism.thresholds.tau).sigmoid()
    wanted = scores_of(inputs).exp() * gate * visible
    assert_close(weights_of(mechanism, inputs, call), wanted / wanted.sum(-1, keepdim=True), atol=1e-12, rtol=1e-12)


# Where gradients go


def test_the_cost_has_no_gradient_towards_queries_and_keys() -> None:
    for mode in ("ste", "soft"):
        mechanism = latte(threshold=1.5, gate={"mode": mode})
        leaves = {name: x.requires_grad_() for name, x in draw(mechanism, spread=1.5).leaves().items()}
        cost = attend(mechanism, Inputs(**leaves)).cost.total.sum()
        found = torch.autograd.grad(cost, [*leaves.values(), mechanism.thresholds.offset], allow_unused=True)
        assert found[:3] == (None, None, None)
        assert (found[3] > 0).all(), "raising a threshold costs more"


@pytest.mark.parametrize("into_scores", [True, False])
def test_the_gate_moves_dropped_keys_only_if_asked_to(into_scores: bool) -> None:
    mechanism = latte(threshold=1.0, gate={"into_scores": into_scores}, estimate={"bits": "exact"})
    inputs = draw(mechanism, spread=1.5)
    never_kept = ~kept_by(mechanism, inputs).any(2)
    assert never_kept.any()
    _, found = gradients(mechanism, inputs, cost=0)
    assert (found["k"][never_kept] != 0).any() == into_scores
    assert not found["v"][never_kept].any()


@pytest.mark.parametrize("settings", [{"gate": {"mode": "hard"}}, {"trainable": False}], ids=str)
def test_fixed_thresholds_receive_no_gradient_and_cost_has_none(settings: dict[str, object]) -> None:
    mechanism = latte(threshold=1.5, **settings)
    assert [p for p in mechanism.parameters() if p.requires_grad] == []
    attended, found = gradients(mechanism, draw(mechanism, spread=1.5))
    assert not attended.cost.total.requires_grad
    assert all(found[name].any() for name in "qkv")


def test_a_threshold_without_border_keys_gets_a_zero_gradient_and_not_none() -> None:
    mechanism = latte(threshold=2000.0)
    attended = attend(mechanism, draw(mechanism))
    (attended.out.sum() + attended.cost.total.sum()).backward()
    assert mechanism.thresholds.offset.grad is not None
    assert not mechanism.thresholds.offset.grad.any()


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("mode", ["ste", "soft"])
def test_padded_rows_leave_the_gradient_of_theta_alone(mode: str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, gate={"mode": mode}, estimate={"bits": "exact"})
    inputs = draw(mechanism, spread=1.5)
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    longer = Inputs(*(torch.cat([x, noise_like(x)], dim=2) for x in (inputs.q, inputs.k, inputs.v)))
    call = Call(queries=first([n, n], 2 * n), keys=first([m, m], 2 * m))
    found = []
    for x, c in ((inputs, Call()), (longer, call)):
        attended = attend(mechanism, x, c)
        loss = (attended.out[:, :, :n] * noise_like(torch.empty(2, 2, n, 8).double())).sum()
        found += torch.autograd.grad(loss + attended.cost.total.sum(), mechanism.thresholds.offset)
    assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)


# Edges


@pytest.mark.parametrize("mode", ["ste", "soft", "hard"])
@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_an_example_without_any_key_is_zero_and_leaves_all_gradients_finite(est_bits: int | str, mode: str) -> None:
    mechanism = latte(threshold=1.5, estimate={"bits": est_bits}, gate={"mode": mode})
    call = Call(keys=first([0, 7], 7))
    attended, found = gradients(mechanism, draw(mechanism), call)
    assert not attended.out[0].any()
    assert not attended.cost.kept[0].any()
    assert not attended.cost.total[0].any()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert name.startswith("thresholds") or not gradient[0].any(), name


@pytest.mark.parametrize("est_bits", [2, 4, 8, "exact"])
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_keys_all_tie_and_are_all_kept(constant: float, est_bits: int | str) -> None:
    mechanism = latte(threshold=0.0, estimate={"bits": est_bits})
    inputs = draw(mechanism)
    inputs = Inputs(inputs.q, torch.full_like(inputs.k, constant), inputs.v)
    attended, found = gradients(mechanism, inputs)
    assert torch.equal(attended.cost.kept, attended.cost.visible)
    assert_close(attended.out, inputs.v.mean(2, keepdim=True).expand_as(attended.out), atol=1e-12, rtol=1e-12)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_one_outlying_channel_makes_all_others_tie_and_keeps_everything() -> None:
    mechanism = latte(threshold=0.0, estimate={"bits": 4})
    inputs = draw(mechanism)
    inputs.q[..., 0], inputs.k[..., 0] = 1e4, 1e4
    cost = attend(mechanism, inputs).cost
    assert torch.equal(cost.kept, cost.visible)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["exact", "int8"])
def test_integer_products_beyond_the_range_of_fp16_are_no_trouble(scoring: str, dtype: torch.dtype) -> None:
    """With 64 dimensions they reach 2^20; fp16 ends at 2^16."""
    mechanism = Latte(2, 64, SELF, estimate={"scoring": scoring})  # type: ignore[arg-type]
    x = torch.ones(1, 2, 5, 64, dtype=dtype)
    attended, found = gradients(mechanism, Inputs(x, x, noise_like(x)))
    assert attended.out.isfinite().all()
    assert torch.equal(attended.cost.kept, attended.cost.visible)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_threshold_that_drifted_below_zero_still_keeps_the_best_key_and_can_return() -> None:
    mechanism = latte(threshold=1.0)
    with torch.no_grad():
        mechanism.thresholds.offset.fill_(-5.0)
    inputs = draw(mechanism, spread=1.5)
    assert (kept_by(mechanism.eval(), inputs).sum(-1) >= 1).all()
    cost = attend(mechanism.train(), inputs).cost
    (up,) = torch.autograd.grad(-cost.kept.sum(), mechanism.thresholds.offset, retain_graph=True)
    assert (up < 0).all(), "a loss that wants more keys must be able to raise the threshold"
    (down,) = torch.autograd.grad(cost.kept.sum(), mechanism.thresholds.offset)
    assert not down.any(), "a loss that wants fewer keys must not push it further down"


def test_the_best_key_by_estimate_is_kept_even_if_the_true_best_is_not() -> None:
    for seed in range(50):
        mechanism = latte(threshold=0.0, estimate={"bits": 2})
        inputs = draw(mechanism, spread=6.0, seed=seed)
        keep = kept_by(mechanism, inputs)
        if not keep.gather(-1, scores_of(inputs).argmax(-1, keepdim=True)).all():
            break
    else:
        pytest.fail("no estimate misjudged a row: this test tests nothing")
    assert keep.any(-1).all()
    _, found = gradients(mechanism, inputs)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("count", [1, 3, 99])
def test_leading_keys_are_kept_wherever_visible(count: int) -> None:
    for pattern, call in itertools.product((SELF, CAUSAL), (Call(), padded(SELF, left=True))):
        mechanism, without = (latte(pattern, threshold=0.0, always_keep=n).eval() for n in (count, 0))
        inputs = draw(mechanism, spread=1.5)
        visible = mechanism.visible(inputs.q, inputs.k, call)
        wanted = kept_by(without, inputs, call) | (visible & (torch.arange(7) < count))
        assert torch.equal(kept_by(mechanism, inputs, call), wanted)
        assert torch.equal(attend(mechanism, inputs, call).cost.kept, wanted.sum((-2, -1)).double())


@pytest.mark.parametrize("mode", ["ste", "soft", "hard"])
def test_an_infinite_threshold_trains_without_nan(mode: str) -> None:
    mechanism = latte(threshold=math.inf, gate={"mode": mode})
    projection = nn.Linear(8, 8).double()
    optimiser = torch.optim.Adam([*projection.parameters(), mechanism.thresholds.offset], lr=0.1)
    inputs = draw(mechanism)
    for _ in range(5):
        attended = attend(mechanism, Inputs(projection(inputs.q), projection(inputs.k), inputs.v))
        optimiser.zero_grad()
        (attended.out.square().mean() + attended.cost.total.mean() / attended.cost.dense.mean()).backward()
        optimiser.step()
        assert all(p.isfinite().all() for p in [*projection.parameters(), mechanism.thresholds.offset])
    assert torch.equal(attended.cost.kept, attended.cost.visible)


def test_autocast_decides_in_fp32_and_trains_thresholds_in_fp32() -> None:
    mechanism = Latte(2, 8, SELF, threshold=1.5)
    inputs = draw(mechanism, lengths=(33, 33), spread=1.5, dtype=torch.float32)
    plain, plain_gradients = gradients(mechanism, inputs, cost=1)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_gradients = gradients(mechanism, inputs, cost=1)
    assert torch.equal(low.cost.kept, plain.cost.kept)
    assert low_gradients["thresholds.offset"].dtype == torch.float32
    assert_close(low_gradients["thresholds.offset"], plain_gradients["thresholds.offset"], rtol=0.02, atol=0.02)


def test_a_small_step_of_a_threshold_is_not_lost_in_a_bf16_model() -> None:
    """Thresholds stay fp32 under autocast; 8 bits of mantissa could not add 0.01 to 6.9."""
    mechanism = Latte(2, 8, SELF)
    with torch.no_grad():
        mechanism.thresholds.offset += 0.01
    assert_close(mechanism.thresholds.values(), torch.full((2,), 6.91))


def test_another_length_shifts_the_thresholds_of_a_mechanism() -> None:
    mechanism = latte(threshold=1.5)
    mechanism.thresholds.transfer_length(128, 256)
    assert_close(mechanism.thresholds.values(), torch.full((2,), 1.5 + math.log(2)).double())


def test_thresholds_in_spreads_do_not_depend_on_the_length() -> None:
    with pytest.raises(ValueError, match="count the spread of their row"):
        latte(unit="spread").thresholds.transfer_length(128, 256)


@pytest.mark.parametrize("pattern", Pattern)
def test_in_spreads_a_row_keeps_the_keys_above_a_share_of_the_way_from_its_mean_to_its_best(pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=0.6, unit="spread", estimate={"bits": "exact"})
    inputs = draw(mechanism, spread=1.5)
    for call in (Call(), padded(pattern)):
        visible = mechanism.visible(inputs.q, inputs.k, call)
        scores = scores_of(inputs)
        bound = scores.masked_fill(~visible, -math.inf).amax(-1, keepdim=True)
        bound = bound - 0.6 * spread_by_definition(scores, visible)
        wanted = (scores >= bound) & visible
        assert torch.equal(kept_by(mechanism, inputs, call), wanted)
        flat = Inputs(inputs.q * 0.01, inputs.k, inputs.v)
        assert torch.equal(kept_by(mechanism, flat, call), wanted), "the scale of a row matters"


def test_dropout_follows_the_renormalisation() -> None:
    mechanism = latte(threshold=1.5)
    inputs = draw(mechanism, spread=1.5)
    plain = weights_of(mechanism, inputs)
    mechanism.dropout = 0.5
    dropped = weights_of(mechanism, inputs)
    assert_close(dropped[dropped > 0], 2 * plain[dropped > 0])
    assert ((dropped == 0) & (plain > 0)).any()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"estimate": {"bits": 3}}, "estimate.bits must be one of 2, 4, 8, exact; got 3"),
        ({"estimate": {"bits": "4"}}, "estimate.bits must be one of 2, 4, 8, exact; got '4'"),
        ({"estimate": {"split": "floor"}}, "estimate.split must be one of round, truncate; got 'floor'"),
        ({"estimate": {"scoring": "fp8"}}, "estimate.scoring must be one of exact, int8; got 'fp8'"),
        ({"gate": {"mode": "straight"}}, "gate.mode must be one of ste, soft, hard; got 'straight'"),
        ({"threshold": -1.0}, "threshold must be a finite number, at least 0; got -1.0"),
        ({"threshold": math.nan}, "at least 0; got nan"),
        ({"gate": {"tau": 0.0}}, "gate.tau must be a finite number above 0; got 0.0"),
        ({"always_keep": -1}, "always_keep must be a whole number, at least 0; got -1"),
        ({"gate": {"surrogate": "step"}}, "gate.surrogate must be one of sigmoid, compact, inside; got 'step'"),
        ({"gate": {"surrogate": "compact", "mode": "soft"}}, "gate.surrogate=compact is for gate.mode=ste"),
        ({"backend": "gpu"}, "backend must be one of auto, reference, cpu, triton; got 'gpu'"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_hyper_parameter_out_of_range_is_refused_and_the_options_named(
    wrong: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        latte(**wrong)
