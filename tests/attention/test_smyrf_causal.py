"""SMYRF in causal self attention: nothing of the future comes through, and nothing of the past is out of reach."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.testing.inputs import (
    Inputs,
    attend,
    count_saved_bytes,
    disturb,
    draw,
    first,
    gradients,
    last,
    noise_like,
    padded,
    softmax_attention,
)

SELF = Pattern.CAUSAL_SELF


def smyrf(**hyperparameters: object) -> Smyrf:
    torch.manual_seed(0)
    return Smyrf(2, 8, SELF, **hyperparameters).eval()  # type: ignore[arg-type]


def meetings(mechanism: Smyrf, inputs: Inputs, call: Call) -> list[Tensor]:
    """Return [r, b, h, n, m] for the blocks and for each level: which visible pairs share a cluster in which round."""
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
    visible = mechanism.visible(inputs.q, inputs.k, call)
    return [
        (part.query_cluster[..., :, None] == part.key_cluster[..., None, :]).unflatten(1, visible.shape[:2]) & visible
        for part in mechanism.assign(x.q.flatten(0, 1), x.k.flatten(0, 1), x)
    ]


def multiset_attention(mechanism: Smyrf, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Return softmax attention over the pairs met, those of blocks counted as if they had met in every round."""
    blocks, *levels = meetings(mechanism, inputs, call)
    times = mechanism.rounds * blocks.sum(0) + sum(level.sum(0) for level in levels)
    if mechanism.dedup == "count":
        times = times.clamp_max(1)
    bias = times.double().log() + (0 if call.bias is None else call.bias)
    return softmax_attention(mechanism, inputs, Call(pairs=times > 0, bias=bias.masked_fill(times == 0, 0)))


@pytest.mark.parametrize("n", [9, 16, 33, 50])
@pytest.mark.parametrize(
    "options", [{"cluster": 4, "tail": "mean"}, {"cluster": 5, "rounds": 3, "dedup": "count"}, {"cluster": 2}]
)
def test_nothing_after_a_row_changes_it_by_a_bit(n: int, options: dict[str, object]) -> None:
    """Small disturbances move ranks and boundaries, large ones norms too."""
    mechanism = smyrf(**options)
    inputs = draw(mechanism, lengths=(n, n), spread=2.0)
    keys = first([n - 3, n - 1], n)
    for call in (Call(), Call(keys=keys, queries=keys), Call(keys=last([n - 3, n - 1], n))):
        for training, dropout in ((False, 0.0), (True, 0.4)):
            mechanism.train(training)
            mechanism.dropout = dropout
            before = attend(mechanism, inputs, call)
            for t in (0, n // 4, n // 2 - 1, n // 2, 3 * n // 4, n - 2):
                later = (torch.arange(n) > t).expand(2, 2, n)
                for size in (3.0, 1000.0):
                    after = attend(mechanism, disturb(inputs, later, later, size), call)
                    assert torch.equal(before.out[:, :, : t + 1], after.out[:, :, : t + 1]), f"row {t} sees the future"


def test_later_padding_changes_no_earlier_row() -> None:
    mechanism = smyrf(cluster=4, rounds=3)
    inputs = draw(mechanism, lengths=(50, 50), spread=2.0)
    keys = torch.ones(2, 50, dtype=torch.bool)
    fewer = keys.clone()
    fewer[:, [30, 41, 49]] = False
    before, after = (attend(mechanism, inputs, Call(keys=x)).out for x in (keys, fewer))
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


@pytest.mark.parametrize("n", [5, 16, 23, 50])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dedup", ["none", "count"])
def test_blocks_levels_and_rounds_merge_into_the_softmax_of_what_was_met(dedup: str, rounds: int, n: int) -> None:
    mechanism = smyrf(cluster=4, rounds=rounds, dedup=dedup)
    inputs = draw(mechanism, lengths=(n, n), spread=1.5)
    bias = noise_like(torch.empty(1, 2, n, n, dtype=torch.float64))
    pairs = noise_like(torch.empty(2, 2, n, n)) > -1
    scattered = noise_like(torch.empty(2, n), seed=5) > -0.5
    calls = [padded(SELF, lengths=(n, n)), Call(keys=scattered), Call(queries=scattered), Call(bias=bias)]
    for call in (Call(), *calls, Call(pairs=pairs, bias=bias)):
        attended, found = gradients(mechanism, inputs, call)
        wanted = multiset_attention(mechanism, inputs, call)
        assert_close(attended.out, wanted["out"], atol=1e-10, rtol=1e-10)
        for name in ("q", "k", "v"):
            assert_close(found[name], wanted[name], atol=1e-10, rtol=1e-10)
        met = torch.cat(meetings(mechanism, inputs, call))
        assert torch.equal(attended.cost.kept, met.any(0).sum((-2, -1)).float())
        assert torch.equal(attended.cost.score, met.sum((0, -2, -1)).float() * 8)


@pytest.mark.parametrize("n", [9, 32, 50])
def test_the_parts_hold_each_earlier_key_once_and_clusters_are_equal(n: int) -> None:
    mechanism = smyrf(cluster=4, rounds=3)
    inputs = draw(mechanism, lengths=(n, n))
    for call in (Call(), padded(SELF, lengths=(n, n), left=True)):
        blocks, *levels = (part.any(0) for part in meetings(smyrf(cluster=4, rounds=64), inputs, call))
        held = torch.stack([blocks, *levels]).sum(0)
        assert held.max() == 1, "two parts hold the same pair"
        share = held.sum() / mechanism.visible(inputs.q, inputs.k, call).sum()
        assert share > 0.95, f"64 rounds reach {share:.2f} of the past"
        for level in meetings(mechanism, inputs, call)[1:]:
            assert set(level.sum(-1).unique().tolist()) <= {0, 2}, "a cluster of the past is not full"


def test_each_query_of_a_level_meets_its_cluster_in_every_round() -> None:
    mechanism = smyrf(cluster=4, rounds=3)
    for level, length in zip(
        meetings(mechanism, draw(mechanism, lengths=(50, 50)), Call())[1:], (4, 8, 16), strict=False
    ):
        odd = torch.arange(50) // length % 2 == 1
        assert torch.equal(level.any(-1), odd.expand_as(level[..., 0]))


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_block_is_dense_attention_and_a_block_counts_in_every_round(rounds: int) -> None:
    mechanism = smyrf(cluster=6, rounds=rounds)
    inputs = draw(mechanism, lengths=(9, 9))
    call = Call(keys=first([6, 5], 9))
    attended, found = gradients(mechanism, inputs, call)
    for name, reference in softmax_attention(mechanism, inputs, call).items():
        assert_close(attended.out if name == "out" else found[name], reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_changes_nothing(left: bool) -> None:
    mechanism = smyrf(cluster=4, rounds=2)
    inputs = draw(mechanism, lengths=(40, 40), batch=3)
    lengths = [40, 23, 31]
    keys = (last if left else first)(lengths, 40)
    together = attend(mechanism, inputs, Call(queries=keys, keys=keys))
    for i, length in enumerate(lengths):
        rows = slice(40 - length, 40) if left else slice(length)
        alone = attend(mechanism, Inputs(*(x[i : i + 1, :, rows] for x in (inputs.q, inputs.k, inputs.v))))
        assert_close(together.out[i : i + 1, :, rows], alone.out, atol=1e-12, rtol=1e-12)
        for name, part in alone.cost._asdict().items():
            assert torch.equal(getattr(together.cost, name)[i : i + 1], part), f"padding changes cost.{name}"


def test_the_last_queries_alone_get_what_they_get_in_the_sequence() -> None:
    mechanism = smyrf(cluster=4, rounds=2)
    inputs = draw(mechanism, lengths=(41, 41))
    for keys in (None, last([41, 30], 41)):
        whole = attend(mechanism, inputs, Call(keys=keys)).out
        for rows in (1, 2, 7, 30):
            part = attend(mechanism, replace(inputs, q=inputs.q[:, :, -rows:]), Call(keys=keys)).out
            assert_close(part, whole[:, :, -rows:], atol=1e-12, rtol=1e-12)


def test_fused_attention_is_the_plain_one() -> None:
    mechanism = smyrf(cluster=8, rounds=3)
    for n in (64, 77):
        inputs = draw(mechanism, lengths=(n, n), spread=1.5)
        zeros = torch.zeros(1, 1, n, n, dtype=torch.float64)
        for call in (Call(), padded(SELF, lengths=(n, n))):
            (fused, found), (plain, wanted) = (
                gradients(mechanism, inputs, x) for x in (call, replace(call, bias=zeros))
            )
            assert_close(fused.out, plain.out, atol=1e-12, rtol=1e-12)
            for name, gradient in found.items():
                assert_close(gradient, wanted[name], atol=1e-12, rtol=1e-12)


def test_saved_memory_and_kept_pairs_grow_hardly_faster_than_the_length() -> None:
    mechanism = smyrf(cluster=16, rounds=2)
    small, large = (count_saved_bytes(mechanism, n) for n in (1024, 2048))
    assert 1.8 < large / small < 2.3
    kept = [attend(mechanism, draw(mechanism, lengths=(n, n), batch=1)).cost.kept.sum() for n in (1024, 2048)]
    assert 2 < kept[1] / kept[0] < 2.4


def test_on_structured_data_clusters_capture_far_more_mass_than_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(1, 2, 16, 8, generator=rng, dtype=torch.float64)
    which = torch.randint(16, (512,), generator=rng)
    q, k = (
        centres[:, :, which] + 0.1 * torch.randn(1, 2, 512, 8, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    inputs = Inputs(q, k, k)
    weights = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(512, 512).triu(1).bool(), float("-inf")).softmax(-1)
    masses = []
    for rounds in (1, 2, 4, 8):
        met = torch.cat(meetings(smyrf(cluster=32, rounds=rounds), inputs, Call())).any(0)
        masses.append(float((weights * met).sum() / weights.sum()))
        random = float(met.sum() / weights.gt(0).sum())
        assert masses[-1] > min(1.5 * random, random + (1 - random) / 2), (
            f"{rounds} rounds: {masses[-1]:.2f}, {random:.2f}"
        )
    assert masses == sorted(masses)
