"""SMYRF: the numbered tests of its specification; references are plain PyTorch in fp64."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.smyrf.clusters import Clusters, Directions, hash_tokens
from thresher.attention.smyrf.layout import build_layout, compute_ranks, gather_slots, sum_slots
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.testing.inputs import (
    Inputs,
    attend,
    count_saved_bytes,
    draw,
    first,
    gradients,
    noise_like,
    padded,
    softmax_attention,
)

SELF, CROSS, CAUSAL_CROSS = Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS
PATTERNS = [SELF, CROSS, CAUSAL_CROSS]


def smyrf(pattern: Pattern = SELF, **hyperparameters: object) -> Smyrf:
    torch.manual_seed(0)
    return Smyrf(2, 8, pattern, **hyperparameters).eval()  # type: ignore[arg-type]


def drawn(mechanism: Smyrf, n: int = 24, m: int = 20, **options: object) -> Inputs:
    return draw(mechanism, lengths=(n, m if mechanism.pattern.cross else n), **options)  # type: ignore[arg-type]


def clusters_of(mechanism: Smyrf, inputs: Inputs, call: Call) -> Clusters:
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
    (clusters,) = mechanism.assign(x.q.flatten(0, 1), x.k.flatten(0, 1), x)
    return clusters


def meetings(mechanism: Smyrf, inputs: Inputs, call: Call) -> Tensor:
    """Return [r, b, h, n, m]: which visible pairs share a cluster in which round."""
    clusters = clusters_of(mechanism, inputs, call)
    same = clusters.query_cluster[..., :, None] == clusters.key_cluster[..., None, :]
    visible = mechanism.visible(inputs.q, inputs.k, call)
    return same.unflatten(1, visible.shape[:2]) & visible


def multiset_attention(mechanism: Smyrf, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Return softmax attention over the pairs met, each counted as often as `dedup` wants, and its gradients."""
    met = meetings(mechanism, inputs, call).sum(0)
    times = met.clamp_max(1) if mechanism.dedup == "count" else met
    bias = times.double().log() + (0 if call.bias is None else call.bias)
    return softmax_attention(mechanism, inputs, Call(pairs=met > 0, bias=bias.masked_fill(met == 0, 0)))


def test_1_the_transforms_turn_inner_products_into_distances() -> None:
    mechanism = smyrf()
    mechanism.directions, mechanism.shifts = torch.randn(400_000, 10), torch.zeros(400_000)
    inputs = draw(mechanism, batch=1, lengths=(3, 3), dtype=torch.float32)
    q, k = inputs.q[0, :1], inputs.k[0, :1]
    hash_q, hash_k = (
        x[:, 0]
        for x in hash_tokens(q, k, Directions(mechanism.directions, mechanism.shifts, None), independent_queries=False)
    )
    distance = (hash_q[:, :, None] - hash_k[:, None, :]).square().mean(0)  # E (a.u)^2 = |u|^2
    constant = distance + 2 * (q @ k.mT)[0]
    wanted = 2 * (q.square().sum(-1).max() + k.square().sum(-1).max())
    assert_close(constant, wanted.expand_as(constant), rtol=0.02, atol=0.0)
    for x in (hash_q, hash_k):
        assert_close(x.square().mean(0), (wanted / 2).expand(3), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_2_one_cluster_is_dense_attention(pattern: Pattern, rounds: int) -> None:
    """Three visible keys fit into one cluster although there are more tokens, so hashing does run."""
    mechanism = smyrf(pattern, cluster=3, rounds=rounds)
    inputs = drawn(mechanism, 9, 9)
    call = Call(keys=first([3, 2], 9))
    attended, found = gradients(mechanism, inputs, call)
    for name, reference in softmax_attention(mechanism, inputs, call).items():
        assert_close(attended.out if name == "out" else found[name], reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("cluster", "n", "m"), [(4, 24, 20), (5, 23, 31), (7, 8, 50), (3, 40, 4)])
def test_3_clusters_are_balanced_and_hold_each_visible_token_once(
    pattern: Pattern, cluster: int, n: int, m: int
) -> None:
    mechanism = smyrf(pattern, cluster=cluster, rounds=3)
    inputs = drawn(mechanism, n, m)
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        clusters = clusters_of(mechanism, inputs, call)
        everything = torch.ones(2, 1, dtype=torch.bool)
        for of, keys, valid in ((clusters.key_cluster, True, call.keys), (clusters.query_cluster, False, call.queries)):
            seen = (everything.expand(2, of.shape[-1]) if valid is None else valid).repeat_interleave(2, 0)
            assert torch.equal(of >= 0, seen.expand(3, -1, -1)), "a hidden token has a cluster"
            for one, tokens in ((one, seen[g]) for of_round in of for g, one in enumerate(of_round)):
                sizes = one[tokens].unique(return_counts=True)[1]
                if keys or not pattern.causal:
                    assert sizes.max() - sizes.min() <= 1
                if keys:
                    assert sizes.max() <= cluster
        for layout, of in ((clusters.queries, clusters.query_cluster), (clusters.keys, clusters.key_cluster)):
            slots = layout.token.shape[-1]
            assert torch.equal(layout.slot < slots, of >= 0), "a token is lost"
            for token, slot in zip(layout.token, layout.slot.transpose(0, 1), strict=True):
                held = slot[slot < slots]
                assert held.unique().numel() == held.numel(), "two tokens share a slot"
                assert torch.equal(token[held], (slot < slots).nonzero()[:, 1])
                assert (token < of.shape[-1]).sum() == held.numel(), "a slot holds a token that is not there"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("dedup", ["none", "count"])
def test_4_and_8_rounds_merge_into_the_softmax_of_what_was_met(dedup: str, rounds: int, pattern: Pattern) -> None:
    mechanism = smyrf(pattern, cluster=5, rounds=rounds, dedup=dedup)
    inputs = drawn(mechanism, spread=1.5)
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    bias = noise_like(torch.empty(1, 2, n, m, dtype=torch.float64))
    pairs = noise_like(torch.empty(2, 2, n, m)) > -1
    for call in (Call(), padded(pattern, lengths=(n, m)), Call(bias=bias), Call(pairs=pairs, bias=bias)):
        attended, found = gradients(mechanism, inputs, call)
        for name, reference in multiset_attention(mechanism, inputs, call).items():
            if name != "bias":
                assert_close(attended.out if name == "out" else found[name], reference, atol=1e-10, rtol=1e-10)
        met = meetings(mechanism, inputs, call)
        assert torch.equal(attended.cost.kept, met.any(0).sum((-2, -1)).float())
        assert torch.equal(attended.cost.score, met.sum((0, -2, -1)).float() * 8)
        if call.bias is not None:
            reference = multiset_attention(mechanism, inputs, call)["bias"]
            assert_close(found["bias"], reference.sum(0, keepdim=True), atol=1e-10, rtol=1e-10)


def test_5_a_constant_added_to_the_scores_of_a_query_changes_nothing() -> None:
    mechanism = smyrf(cluster=5, rounds=3)
    inputs = drawn(mechanism)
    constant = 50 * noise_like(torch.empty(1, 2, 24, 1, dtype=torch.float64)).expand(1, 2, 24, 24)
    shifted = attend(mechanism, inputs, Call(bias=constant)).out
    assert_close(attend(mechanism, inputs).out, shifted, atol=1e-10, rtol=1e-10)
    ones = Inputs(inputs.q, inputs.k, torch.ones_like(inputs.v))
    assert_close(attend(mechanism, ones).out, torch.ones_like(inputs.v), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_6_padding_changes_nothing_with_several_examples_heads_and_lengths(pattern: Pattern) -> None:
    """The official code repeats the mask in (head, example) order for tensors in (example, head) order."""
    mechanism = smyrf(pattern, cluster=4, rounds=2)
    inputs = drawn(mechanism, 16, 16, batch=3)
    lengths = [16, 9, 11]
    keys = first(lengths, 16)
    together = attend(mechanism, inputs, Call(queries=keys, keys=keys)).out
    for i, length in enumerate(lengths):
        alone = Inputs(*(x[i : i + 1, :, :length] for x in (inputs.q, inputs.k, inputs.v)))
        assert_close(together[i : i + 1, :, :length], attend(mechanism, alone).out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pattern", [CROSS, CAUSAL_CROSS])
@pytest.mark.parametrize(("n", "m"), [(3, 64), (64, 9), (1, 20)])
def test_7_queries_and_keys_share_the_clusters_whatever_their_numbers(pattern: Pattern, n: int, m: int) -> None:
    mechanism = smyrf(pattern, cluster=4, rounds=2)
    inputs = drawn(mechanism, n, m)
    assert_close(
        attend(mechanism, inputs).out, multiset_attention(mechanism, inputs, Call())["out"], atol=1e-12, rtol=1e-12
    )


def captured(inputs: Inputs, cluster: int, rounds: int, pattern: Pattern = SELF) -> float:
    mechanism = smyrf(pattern, cluster=cluster, rounds=rounds)
    met = meetings(mechanism, inputs, Call()).any(0)
    weights = (inputs.q @ inputs.k.mT * 8**-0.5).softmax(-1)
    return float((weights * met).sum() / weights.sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_9_on_structured_data_clusters_capture_far_more_mass_than_chance(pattern: Pattern) -> None:
    rng = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(1, 2, 16, 8, generator=rng, dtype=torch.float64)
    which = torch.arange(256) % 16
    q, k = (
        centres[:, :, which] + 0.1 * torch.randn(1, 2, 256, 8, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    inputs = Inputs(q, k, k)
    chance = 2 if pattern.causal else 3  # boundaries that ignore the queries fit them less well
    masses = [captured(inputs, 16, rounds, pattern) for rounds in (1, 2, 4, 8)]
    assert masses == sorted(masses)
    for mass, rounds in zip(masses, (1, 2, 4, 8), strict=True):
        assert mass > min(chance * rounds * 16 / 256, 0.7), f"{rounds} rounds capture {mass:.2f}"


def test_10_seeds_decide_in_training_and_nothing_does_in_evaluation() -> None:
    for resample, changes in (("forward", True), ("never", False)):
        mechanism = smyrf(resample=resample).train()
        inputs = drawn(mechanism)
        one, again, other = (attend(mechanism, inputs, seed=seed).out for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert torch.equal(one, other) != changes
    torch.manual_seed(1)
    assert not torch.equal(Smyrf(2, 8, SELF).directions, smyrf().directions)


def test_11_the_published_width_and_shift_have_no_effect_unless_values_are_rounded() -> None:
    inputs = drawn(smyrf())
    plain, wide = (attend(smyrf(width=width), inputs).out for width in (1.0, 100.0))
    assert torch.equal(plain, wide)
    narrow, wide = (attend(smyrf(width=width, quantise=True), inputs).out for width in (1.0, 100.0))
    assert not torch.equal(narrow, wide)
    shifted = smyrf(quantise=True)
    shifted.shifts += 0.5
    assert not torch.equal(attend(shifted, inputs).out, attend(smyrf(quantise=True), inputs).out)


def test_13_a_later_query_moves_no_earlier_one_to_another_cluster() -> None:
    """Ranked together, as published, queries would betray each other: noncausal cross attention shows that it can."""
    moved = {}
    for pattern in (CROSS, CAUSAL_CROSS):
        mechanism = smyrf(pattern, cluster=4, rounds=4)
        inputs = drawn(mechanism, 24, 20)
        later = inputs.q.clone()
        later[:, :, 12:] = 100 * noise_like(later[:, :, 12:])
        before, after = (clusters_of(mechanism, Inputs(q, inputs.k, inputs.v), Call()) for q in (inputs.q, later))
        moved[pattern] = not torch.equal(before.query_cluster[..., :12], after.query_cluster[..., :12])
    assert moved == {CROSS: True, CAUSAL_CROSS: False}


def test_equal_tokens_and_one_dimension_are_no_obstacle() -> None:
    for mechanism, d in ((Smyrf(2, 1, SELF, cluster=3), 1), (smyrf(cluster=3), 8)):
        x = torch.ones(2, 2, 10, d, requires_grad=True)
        out = mechanism(x, x, x, Call()).out
        assert_close(out, torch.ones_like(out))
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.isfinite().all()


def test_norms_beyond_the_range_of_fp16_squares_do_not_overflow() -> None:
    inputs = drawn(smyrf(), spread=1.0, dtype=torch.float16)
    big = Inputs(inputs.q * 1000, inputs.k * 1000, inputs.v)
    assert attend(smyrf(), big).out.isfinite().all()


def test_saved_memory_grows_with_the_length_not_with_its_square() -> None:
    small, large = (count_saved_bytes(Smyrf(2, 8, SELF, cluster=16, rounds=2), n) for n in (1024, 2048))
    assert 1.8 < large / small < 2.2


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("name", "value"), [("cluster", 0), ("rounds", 0), ("width", 0.0), ("dedup", "all"), ("resample", "sometimes")]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        smyrf(**{name: value})


def test_rows_move_to_their_slots_and_are_summed_up_again() -> None:
    slot = torch.tensor([[[2, 0, 6, 5]], [[4, 3, 6, 1]]])  # 6 is none
    layout = build_layout(slot, 6)
    assert layout.token.tolist() == [[1, 3, 0, 1, 0, 3]]
    x = noise_like(torch.empty(1, 4, 3, dtype=torch.float64))
    moved = gather_slots(x, layout.token)
    assert torch.equal(moved[0], x[0, layout.token[0]])
    times = torch.tensor([[2], [2], [0], [2]])
    assert_close(sum_slots(moved, layout)[0], x[0] * times)
    weights = torch.tensor([2.0, 10.0], dtype=torch.float64)[:, None, None].expand(2, 1, 4)
    assert_close(sum_slots(moved, layout, weights)[0], x[0] * times * 6)
    moved[0, 5] = float("nan")
    assert sum_slots(moved, layout)[0, :3].isfinite().all(), "nan reaches a token that is not there"
    assert compute_ranks(torch.tensor([[[3.0, 1.0, 3.0, -1.0]]])).tolist() == [[[2, 1, 3, 0]]]


def test_gradients_with_dropout_are_those_of_finite_differences() -> None:
    for dedup in ("none", "count"):
        mechanism = smyrf(cluster=4, rounds=2, dedup=dedup, resample="never").train()
        mechanism.dropout = 0.4
        inputs = drawn(mechanism, 9, 9, batch=1)

        def run(*leaves: Tensor, mechanism: Smyrf = mechanism) -> Tensor:
            return attend(mechanism, Inputs(*leaves), seed=3).out

        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "m"), [(24, 24), (23, 31), (40, 9)])
def test_fused_attention_is_the_plain_one(pattern: Pattern, n: int, m: int) -> None:
    """Full clusters, others, and padding; a bias of zeros takes the plain path."""
    mechanism = smyrf(pattern, cluster=4, rounds=3, backend="reference")
    inputs = drawn(mechanism, n, m, spread=1.5)
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    zeros = torch.zeros(1, 1, n, m, dtype=torch.float64)
    for call in (Call(), padded(pattern, lengths=(n, m))):
        fused, found = gradients(mechanism, inputs, call)
        plain, wanted = gradients(mechanism, inputs, replace(call, bias=zeros))
        assert_close(fused.out, plain.out, atol=1e-12, rtol=1e-12)
        for name, gradient in found.items():
            assert_close(gradient, wanted[name], atol=1e-12, rtol=1e-12)
        with mock.patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", side_effect=ValueError):
            assert torch.equal(attend(mechanism, inputs, replace(call, bias=zeros)).out, plain.out)
            with pytest.raises(ValueError):  # noqa: PT011
                attend(mechanism, inputs, call)


def test_a_large_bias_leaves_gradients_finite_where_clusters_are_not_full() -> None:
    mechanism = smyrf(cluster=4)
    inputs = drawn(mechanism, 10, 10, dtype=torch.float32)
    _, found = gradients(mechanism, inputs, Call(bias=torch.full((1, 1, 10, 10), 100.0)))
    assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nan_in_one_example_comes_out_there_and_breaks_no_other(pattern: Pattern) -> None:
    mechanism = smyrf(pattern, cluster=4)
    inputs = drawn(mechanism, 10, 10)
    before = attend(mechanism, inputs, Call(keys=first([4, 10], 10))).out
    inputs.k[0, 0, 0] = float("nan")
    after = attend(mechanism, inputs, Call(keys=first([4, 10], 10))).out
    assert after[0, 0].isnan().any()
    assert torch.equal(after[1], before[1])


def test_self_attention_with_fewer_queries_than_keys_is_no_special_case() -> None:
    mechanism = smyrf(cluster=4)
    inputs = draw(mechanism, lengths=(20, 8))
    assert_close(attend(mechanism, inputs).out, multiset_attention(mechanism, inputs, Call())["out"])
