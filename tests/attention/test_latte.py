"""LATTE against its specification, T1 to T12; references are plain PyTorch in fp64."""

import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.attention.latte_reference import (
    CAUSAL,
    EXACT,
    SELF,
    difference_of,
    estimate_of,
    kept_by,
    latte,
    masked_attention,
    reference_with_gate,
    scores_of,
    spread_by_definition,
)
from thresher import sparsify
from thresher.attention import Call, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.attention.latte.quantise import complete_product, estimate_product, split_codes
from thresher.testing import checks
from thresher.testing.inputs import Inputs, attend, draw, first, gradients, noise_like, padded


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("est_bits", [8, "exact"])
@pytest.mark.parametrize("mode", ["ste", "soft", "hard"])
def test_t1_an_infinite_threshold_is_softmax_attention(mode: str, est_bits: int | str, pattern: Pattern) -> None:
    """Padding, causality, cross attention, shared heads and bias are all in this check of the contract."""
    checks.check_dense_limit(
        Latte(
            4, 8, pattern, threshold=math.inf, gate={"mode": mode, "surrogate": "sigmoid"}, estimate={"bits": est_bits}
        )
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("split", ["round", "truncate"])
def test_t2_the_nibble_identity_holds_for_all_pairs_of_codes(split: str, bits: int) -> None:
    codes = torch.arange(-128, 128)[None, None, :, None]
    halves = split_codes(codes.float(), bits, split)  # type: ignore[arg-type]
    high, low, step = halves.high.int(), halves.low.int(), halves.step
    terms = step**2 * high @ high.mT + step * (high @ low.mT + low @ high.mT) + low @ low.mT
    assert torch.equal(terms, (codes @ codes.mT).int())
    product = complete_product(estimate_product(halves, halves), halves, halves)
    assert torch.equal(product.int(), (codes @ codes.mT).int())


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("gamma", [0.5, 0.05, 1e-3])
def test_t3_a_key_is_kept_iff_its_probability_is_gamma_times_the_largest(gamma: float, pattern: Pattern) -> None:
    theta = -math.log(gamma)
    mechanism = latte(pattern, threshold=theta, **EXACT).eval()
    inputs = draw(mechanism, spread=1.5)
    for call in (Call(), padded(pattern), padded(pattern, left=True)):
        visible = mechanism.visible(inputs.q, inputs.k, call)
        scores = scores_of(inputs)
        kept = kept_by(mechanism, inputs, call)
        for x in itertools.product(*(range(size) for size in scores.shape[:3])):
            seen = visible[x].nonzero()[:, 0]
            if len(seen) == 0:
                assert not kept[x].any()
                continue
            probabilities = scores[x][seen].softmax(0)
            difference = scores[x][seen].max() - scores[x][seen]
            clear = (difference - mechanism.thresholds.values()[x[1]]).abs() > 1e-6
            wanted = probabilities >= gamma * probabilities.max()
            assert torch.equal(kept[x][seen][clear], wanted[clear])


@pytest.mark.parametrize("est_bits", [2, 4, 8, "exact"])
@pytest.mark.parametrize("pattern", [SELF, CAUSAL, Pattern.NONCAUSAL_CROSS])
def test_t4_gradients_are_those_of_softmax_attention_under_the_frozen_mask(
    pattern: Pattern, est_bits: int | str
) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": est_bits}, gate={"into_scores": False})
    for call in (Call(), padded(pattern)):
        inputs = draw(mechanism, spread=1.5)
        keep = kept_by(mechanism, inputs, call)
        assert 0.1 < keep.sum() / mechanism.visible(inputs.q, inputs.k, call).sum() < 0.9
        attended, found = gradients(mechanism, inputs, call, cost=0)
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = masked_attention(*leaves, keep)
        assert_close(attended.out, out, atol=1e-12, rtol=1e-12)
        for name, wanted in zip("qkv", torch.autograd.grad((out * noise_like(out)).sum(), leaves), strict=True):
            assert_close(found[name], wanted, atol=1e-12, rtol=1e-12)


def test_t5_the_gradient_of_theta_is_the_closed_form() -> None:
    mechanism = latte(threshold=1.5, gate={"tau": 0.7}, estimate={"bits": "exact"})
    inputs, call = draw(mechanism, spread=1.5), padded(SELF)
    attended, found = gradients(mechanism, inputs, call, cost=0)
    visible = mechanism.visible(inputs.q, inputs.k, call)
    scores, upstream = scores_of(inputs), noise_like(attended.out)
    difference = difference_of(scores, visible)
    e = scores.exp() * visible
    z = (e * (difference <= 1.5)).sum(-1, keepdim=True)
    c = (upstream * attended.out).sum(-1, keepdim=True)
    to_mask = e / torch.where(z == 0, 1, z) * (upstream @ inputs.v.transpose(-2, -1) - c)
    soft = ((1.5 - difference) / mechanism.thresholds.tau).sigmoid()
    wanted = (to_mask * soft * (1 - soft) / mechanism.thresholds.tau).sum((0, 2, 3))
    assert_close(found["thresholds.offset"], wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("into_scores", [True, False])
@pytest.mark.parametrize("est_bits", [4, "exact"])
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize(
    ("surrogate", "tau"), [("sigmoid", 0.5), ("compact", 0.5), ("compact", 0.125), ("inside", 0.5)]
)
def test_t5_all_gradients_are_those_of_a_straight_through_gate(
    surrogate: str, tau: float, unit: str, est_bits: int | str, into_scores: bool
) -> None:
    theta = 1.5 if unit == "nats" else 0.6137  # no ratio of small integers, as estimates are
    settings = {"gate": {"tau": tau, "surrogate": surrogate, "into_scores": into_scores}}
    mechanism = latte(threshold=theta, unit=unit, estimate={"bits": est_bits}, **settings)
    mechanism.thresholds.base.fill_(theta)  # in fp64
    inputs = draw(mechanism, spread=1.5)
    inputs.k[1, :, 5:] = 0
    call = Call(keys=first([7, 5], 7))
    attended, found = gradients(mechanism, inputs, call, cost=0)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves().items()}
    leaves["thresholds.offset"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = reference_with_gate(
        Inputs(leaves["q"], leaves["k"], leaves["v"]),
        theta + leaves["thresholds.offset"],
        tau,
        mechanism.visible(inputs.q, inputs.k, call),
        into_scores,
        est_bits if isinstance(est_bits, int) else None,
        spread=unit == "spread",
        surrogate=surrogate,
    )
    assert_close(attended.out, out, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad((out * noise_like(out)).sum(), list(leaves.values()))
    for name, reference in zip(leaves, wanted, strict=True):
        assert_close(found[name], reference, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("into_scores", [True, False])
@pytest.mark.parametrize("est_bits", [4, "exact"])
@pytest.mark.parametrize("unit", ["nats", "spread"])
def test_t5_all_gradients_of_soft_mode_are_those_of_its_formula(
    unit: str, est_bits: int | str, into_scores: bool
) -> None:
    """softmax(S + log sigmoid((theta - difference) / tau)), the best score and the estimate's error held constant."""
    mechanism = latte(
        threshold=1.5,
        gate={"tau": 0.5, "mode": "soft", "into_scores": into_scores},
        unit=unit,
        estimate={"bits": est_bits},
    )
    inputs = draw(mechanism, spread=1.5)
    attended, found = gradients(mechanism, inputs, cost=0)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves().items()}
    scores = scores_of(Inputs(**leaves))
    judged = scores.detach() if est_bits == "exact" else estimate_of(inputs, 4)
    difference = judged.amax(-1, keepdim=True) - judged
    worth = torch.ones(()) if unit == "nats" else spread_by_definition(judged, torch.ones_like(judged).bool())
    difference = difference / worth
    if into_scores:
        difference = difference - (scores - scores.detach()) / worth.clamp_min(1)
    leaves["thresholds.offset"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    theta = 1.5 + leaves["thresholds.offset"][:, None, None]
    gate = ((theta - difference) / 0.5).sigmoid()
    weights = scores.exp() * gate
    out = weights / weights.sum(-1, keepdim=True) @ leaves["v"]
    assert_close(attended.out, out, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad((out * noise_like(out)).sum(), list(leaves.values()))
    for name, reference in zip(leaves, wanted, strict=True):
        assert_close(found[name], reference, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("call", [Call(), padded(SELF)], ids=["all", "padded"])
def test_t5_the_gradient_of_theta_in_soft_mode_is_the_finite_difference(call: Call) -> None:
    mechanism = latte(threshold=1.5, gate={"mode": "soft"})
    inputs = draw(mechanism, spread=1.5)
    _, found = gradients(mechanism, inputs, call, cost=0)
    for head in range(2):
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                mechanism.thresholds.offset.zero_()[head] = step
            out = attend(mechanism, inputs, call).out
            losses.append((out * noise_like(out)).sum().item())
        assert found["thresholds.offset"][head].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-5)


@pytest.mark.parametrize("est_bits", [2, 4, 8, "exact"])
def test_t6_a_larger_threshold_keeps_a_superset(est_bits: int | str) -> None:
    before = torch.zeros(2, 2, 7, 7, dtype=torch.bool)
    counts = []
    for theta in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf):
        mechanism = latte(threshold=theta, estimate={"bits": est_bits}).eval()
        inputs = draw(mechanism, spread=1.5)
        keep = kept_by(mechanism, inputs)
        assert (keep | ~before).all()
        counts.append(attend(mechanism, inputs).cost.kept.sum().item())
        before = keep
    assert counts == sorted(counts)
    assert counts[0] < counts[3] < counts[-1] == 2 * 2 * 49


@pytest.mark.parametrize("theta", [0.5, 2.0, 4.0])
def test_t7_the_error_is_bounded_by_the_mass_that_was_dropped(theta: float) -> None:
    mechanism = latte(threshold=theta, **EXACT).eval()
    inputs = draw(mechanism, lengths=(24, 24), spread=1.5)
    probabilities, keep = scores_of(inputs).softmax(-1), kept_by(mechanism, inputs)
    dropped = (probabilities * ~keep).sum(-1)
    error = probabilities @ inputs.v - attend(mechanism, inputs).out
    mean_dropped = (probabilities * ~keep) @ inputs.v / dropped.clamp_min(1e-300)[..., None]
    mean_kept = (probabilities * keep) @ inputs.v / (1 - dropped)[..., None]
    assert_close(error, dropped[..., None] * (mean_dropped - mean_kept), atol=1e-12, rtol=1e-12)
    diameter = torch.cdist(inputs.v, inputs.v).amax((-2, -1))[..., None]
    assert (error.norm(dim=-1) <= dropped * diameter + 1e-12).all()
    excess = (~keep).sum(-1) * math.exp(-theta)
    assert (dropped <= excess / (1 + excess) + 1e-12).all()
    assert (dropped > 0).any()


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_t8_a_constant_added_to_a_row_of_scores_changes_nothing(est_bits: int | str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": est_bits})
    inputs = draw(mechanism, spread=1.5)
    (b, h, n, _), m = inputs.q.shape, inputs.k.shape[2]
    shift = noise_like(torch.empty(b, h, n, 1).double(), 20.0).expand(b, h, n, m)
    for training in (True, False):
        mechanism.train(training)
        plain, shifted = attend(mechanism, inputs), attend(mechanism, inputs, Call(bias=shift))
        assert_close(shifted.out, plain.out, atol=1e-12, rtol=1e-12)
        assert torch.equal(shifted.cost.kept, plain.cost.kept)


@pytest.mark.parametrize("pattern", [SELF, Pattern.NONCAUSAL_CROSS])
@pytest.mark.parametrize("est_bits", [2, 4, 8, "exact"])
def test_t9_permuted_keys_permute_the_mask(est_bits: int | str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": est_bits}).eval()
    inputs = draw(mechanism, spread=1.5)
    order = torch.randperm(inputs.k.shape[2], generator=torch.Generator().manual_seed(0))
    permuted = Inputs(inputs.q, inputs.k[:, :, order], inputs.v[:, :, order])
    assert torch.equal(kept_by(mechanism, permuted), kept_by(mechanism, inputs)[..., order])
    assert_close(attend(mechanism, permuted).out, attend(mechanism, inputs).out, atol=1e-12, rtol=1e-12)


def by_hand() -> Inputs:
    """Four tokens with one-dimensional content: S_ij = s_j, with s = 0, 3, 1, 2.9."""
    q, k = torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 1, 4, 4).double()
    q[..., 0], k[..., 0] = 2.0, torch.tensor([0.0, 3.0, 1.0, 2.9])
    return Inputs(q, k, noise_like(k))


FIVE = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]).bool()
ALL_TEN = torch.ones(4, 4).tril().bool()


@pytest.mark.parametrize(
    ("est_bits", "keep", "score", "value", "select"),
    [
        ("exact", FIVE, 0, 5 * 4, 10 * 4),
        (8, FIVE, 0, 5 * 4, 10 * 4),
        (4, FIVE, 5 * 3, 5 * 4, 10 * 1),  # codes 127 become 7 * 16: differences shrink to 0.78 of themselves
        (2, ALL_TEN, 10 * 3.75, 10 * 4, 10 * 0.25),  # codes 127 become 64: to 0.25, all of them below 1
    ],
    ids=["exact", "8", "4", "2"],
)
def test_t10_a_causal_case_is_counted_as_by_hand(
    est_bits: int | str, keep: Tensor, score: float, value: float, select: float
) -> None:
    """Ten visible pairs of four dimensions: dense costs 10 * (4 + 4)."""
    mechanism = latte(CAUSAL, num_heads=1, head_dim=4, threshold=1.0, estimate={"bits": est_bits})
    assert torch.equal(kept_by(mechanism, by_hand())[0, 0], keep)
    for training in (True, False):
        cost = attend(mechanism.train(training), by_hand()).cost
        assert [part.item() for part in cost] == [score, value, select, 80, keep.sum(), 10]


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_t10_padding_never_changes_a_count(est_bits: int | str, pattern: Pattern) -> None:
    mechanism = latte(pattern, threshold=1.5, estimate={"bits": est_bits})
    inputs = draw(mechanism, spread=1.5)
    (b, h, n, d), m = inputs.q.shape, inputs.k.shape[2]
    junk = noise_like(torch.empty(b, h, 3, d).double(), 50.0)
    longer = Inputs(*(torch.cat([x, junk], dim=2) for x in (inputs.q, inputs.k, inputs.v)))
    call = Call(queries=first([n] * b, n + 3), keys=first([m] * b, m + 3))
    wanted, got = attend(mechanism, inputs), attend(mechanism, longer, call)
    for name, before, after in zip(wanted.cost._fields, wanted.cost, got.cost, strict=True):
        assert torch.equal(before, after), name
    assert_close(got.out[:, :, :n], wanted.out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("value_dim", [8, 5])
def test_t10_four_bits_cost_an_eighth_plus_seven_eighths_of_what_is_kept(value_dim: int) -> None:
    mechanism = latte(threshold=1.5, estimate={"bits": 4})
    cost = attend(mechanism, draw(mechanism, spread=1.5, value_dim=value_dim), padded(SELF)).cost
    kept = cost.kept / cost.visible
    assert ((kept > 0.1) & (kept < 0.9)).all()
    in_nibbles = 8 + kept * (3 * 8 + 4 * value_dim)
    assert_close(cost.total / cost.dense, in_nibbles / (4 * 8 + 4 * value_dim), check_dtype=False)
    if value_dim == 8:
        assert_close(cost.total / cost.dense, (1 + 7 * kept) / 8, check_dtype=False)


@pytest.mark.parametrize(("start", "target"), [(6.9, 0.15), (0.1, 0.5)])
def test_t11_the_budget_alone_drives_the_kept_share_to_its_target(start: float, target: float) -> None:
    mechanism = latte(threshold=start)
    optimiser = torch.optim.Adam([mechanism.thresholds.offset], lr=0.05)
    for step in range(280):
        inputs = draw(mechanism, batch=4, lengths=(16, 16), spread=2.0, seed=step)
        cost = attend(mechanism, inputs).cost
        optimiser.zero_grad()
        (cost.kept.sum() / cost.visible.sum() - target).square().backward()
        optimiser.step()
    cost = attend(mechanism, draw(mechanism, batch=64, lengths=(16, 16), spread=2.0, seed=1000)).cost
    assert cost.kept.sum().item() / cost.visible.sum().item() == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("mode", ["ste", "soft"])
def test_t11_the_task_alone_does_not_drive_theta_to_zero(mode: str) -> None:
    """The task is to imitate dense attention: the threshold should rise, and its loss fall."""
    mechanism = latte(threshold=1.0, gate={"mode": mode})
    optimiser = torch.optim.Adam([mechanism.thresholds.offset], lr=0.05)
    losses = []
    for step in range(100):
        inputs = draw(mechanism, batch=8, spread=1.5, seed=step)
        loss = (attend(mechanism, inputs).out - scores_of(inputs).softmax(-1) @ inputs.v).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert (mechanism.thresholds.values() > 1.5).all()
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    ).double()


def images(batch: int = 2) -> Tensor:
    return noise_like(torch.empty(batch, 1, 28, 28).double())


def test_t12_saving_and_loading_keeps_theta() -> None:
    mechanism, other = latte(threshold=1.5), latte(threshold=3.0)
    with torch.no_grad():
        mechanism.thresholds.offset.copy_(torch.tensor([0.25, -0.5]))
    other.load_state_dict(mechanism.state_dict(), strict=True)
    assert other.thresholds.values().tolist() == [1.75, 1.0]


@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_t12_a_dense_checkpoint_loads_and_is_dense_at_gamma_zero(est_bits: int | str) -> None:
    dense, sparse = tiny_vit(), tiny_vit()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += noise_like(parameter, 0.1)
    sparsify(sparse, "latte", threshold=math.inf, estimate={"bits": est_bits})
    sparse.double()
    sparse.load_state_dict(dense.state_dict(), strict=True)
    for training in (True, False):
        dense.train(training)
        sparse.train(training)
        assert_close(sparse(images()), dense(images()), atol=1e-12, rtol=1e-12)


def test_t12_a_dense_checkpoint_keeps_the_thresholds_of_the_model() -> None:
    dense, sparse = tiny_vit(), tiny_vit()
    sparsify(sparse, "latte", threshold=2.5)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    thresholds = [m.thresholds.values() for m in sparse.modules() if isinstance(m, Latte)]
    assert len(thresholds) == 2
    assert torch.stack(thresholds).tolist() == [[2.5, 2.5]] * 2


@pytest.mark.parametrize("missing", ["base", "tau", "offset"])
def test_t12_a_checkpoint_that_lacks_part_of_a_mechanism_is_an_error(missing: str) -> None:
    sparse = tiny_vit()
    sparsify(sparse, "latte")
    state = sparse.state_dict()
    del state[f"blocks.1.attn.mechanism.thresholds.{missing}"]
    with pytest.raises(RuntimeError, match=f"Missing key.*blocks.1.attn.mechanism.thresholds.{missing}"):
        sparse.load_state_dict(state, strict=True)
