"""The tail against its definition: dropped keys weigh by their mean score, times a factor of the head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern, find, hyperparameters
from thresher.attention.shared.sums import RunningSums
from thresher.attention.shared.tail import build_tail, count_tail_cost, weigh_with_tail
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

TAILED: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"keys": 0.3}),
    ("topk", {"keys": 2, "chunk": 3}),
    ("latte", {"threshold": 0.5}),
    ("latte", {"threshold": 1.0, "unit": "nats", "always_keep": 1}),
    ("smyrf", {"cluster": 3}),
    ("smyrf", {"cluster": 4, "rounds": 3, "dedup": "count"}),
]
BACKENDS = ("reference", "auto")


def build(name: str, pattern: Pattern, **changes: Any) -> Mechanism:
    return find(name)(2, 8, pattern, **changes).double()


def attend_by_definition(scores: Tensor, kept: Tensor, visible: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """Compute the formula of the specification: kept weights less a constant, and sums over all visible keys."""
    n, few = visible.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    top = scores.masked_fill(~kept, float("-inf")).amax(-1, keepdim=True)
    total = scores.masked_fill(~visible, 0).sum(-1, keepdim=True)
    mean = (total - scores.masked_fill(~kept, 0).sum(-1, keepdim=True)) / (n - few).clamp_min(1)
    t = factor[:, None, None] * (mean - top).exp() * (n > few)
    e = (scores - top).exp() * kept
    everything = visible.to(v.dtype) @ v
    less = t * kept
    return ((e - less) @ v + t * everything) / ((e - less).sum(-1, keepdim=True) + t * n)


def visible_in(pattern: Pattern, call: Call, inputs: Inputs) -> Tensor:
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    mask = torch.ones(n, m, dtype=torch.bool)
    if pattern is Pattern.CAUSAL_SELF:
        mask = mask.tril(m - n)
    mask = mask.expand(*inputs.q.shape[:2], n, m)
    if call.keys is not None:
        mask = mask & call.keys[:, None, None]
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("keys", [1, 4, 0.4])
def test_top_k_computes_its_definition(pattern: Pattern, keys: int | float, backend: str) -> None:
    mechanism = build("topk", pattern, keys=keys, tail="mean", backend=backend)
    factor = torch.tensor([0.6, 1.3], dtype=torch.float64)
    with torch.no_grad():
        mechanism.tail.factor.copy_(factor)
    lengths = (7, 13) if pattern.cross else (13, 13)
    inputs = draw(mechanism, lengths=lengths)
    for call in (Call(), padded(pattern, lengths=lengths)):
        visible = visible_in(pattern, call, inputs)
        scores = inputs.q @ inputs.k.mT * 8**-0.5
        few = torch.full_like(visible.sum(-1), keys) if isinstance(keys, int) else (visible.sum(-1) * keys).floor()
        few = few.clamp_min(1).minimum(visible.sum(-1))
        place = scores.masked_fill(~visible, float("-inf")).argsort(-1, descending=True).argsort(-1)
        kept = visible & (place < few[..., None])
        wanted = attend_by_definition(scores, kept, visible, inputs.v, factor)
        if call.queries is not None:
            wanted = wanted.masked_fill(~call.queries[:, None, :, None], 0)
        torch.testing.assert_close(attend(mechanism, inputs, call).out, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "changes"), TAILED, ids=str)
def test_a_factor_of_zero_is_no_tail_and_can_come_back(name: str, changes: dict[str, Any], backend: str) -> None:
    tailed = build(name, Pattern.CAUSAL_SELF, tail="mean", backend=backend, **changes)
    without = build(name, Pattern.CAUSAL_SELF, tail="none", backend=backend, **changes)
    with torch.no_grad():
        tailed.tail.factor.zero_()
    inputs = draw(tailed, lengths=(12, 12))
    (one, found), (other, wanted) = (gradients(mechanism, inputs, cost=0) for mechanism in (tailed, without))
    torch.testing.assert_close(one.out, other.out)
    for leaf in "qkv":
        torch.testing.assert_close(found[leaf], wanted[leaf])
    with torch.no_grad():
        tailed.tail.factor.fill_(-0.1)
    direction = found["tail.factor"].sign()
    raised = gradients(tailed, inputs, cost=0)[1]["tail.factor"]
    assert torch.equal(raised != 0, direction < 0), "only a gradient that raises the factor passes its bound"


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(
    ("name", "changes"), [("topk", {"keys": 1.0}), ("latte", {"threshold": float("inf")}), ("smyrf", {"cluster": 14})]
)
def test_nothing_dropped_is_softmax_attention(name: str, changes: dict[str, Any], pattern: Pattern) -> None:
    for backend in BACKENDS:
        mechanism = build(name, pattern, tail="mean", backend=backend, **changes)
        inputs = draw(mechanism, lengths=(9, 14) if pattern.cross else (14, 14))
        one = attend(mechanism, inputs)
        torch.testing.assert_close(one.out, attend(build("dense", pattern), inputs).out)
        assert torch.equal(
            one.cost.select, attend(build(name, pattern, **changes | {"tail": "none"}), inputs).cost.select
        )


@pytest.mark.parametrize("hidden", [False, True])
def test_running_sums_are_those_of_all_visible_tokens(hidden: bool) -> None:
    k, v = noise_like(torch.empty(2, 3, 12, 5)), noise_like(torch.empty(2, 3, 12, 4), seed=1)
    seen = torch.arange(12).expand(2, 12) >= torch.tensor([[0], [3]]) if hidden else None
    if hidden:
        k[1, :, :3], v[1, :, :3] = float("nan"), float("inf")
    sums = RunningSums()
    for m in (5, 5, 6, 9, 4, 12):  # the same again, one more, several more, cropped
        shown = None if seen is None else seen[:, :m]
        mask = torch.ones(2, m, dtype=torch.bool) if shown is None else shown
        found = sums.read(k[:, :, :m], v[:, :, :m], shown)
        for one, tokens in zip(found, (k, v), strict=True):
            torch.testing.assert_close(one, tokens[:, :, :m].masked_fill(~mask[:, None, :, None], 0).sum(2))
    swapped = sums.select(torch.tensor([1, 0])).read(k.flip(0), v.flip(0), None if seen is None else seen.flip(0))
    for one, other in zip(swapped, found, strict=True):
        assert torch.equal(one, other.flip(0))


def test_running_sums_begin_again_when_the_mask_of_earlier_tokens_changes() -> None:
    k = torch.ones(1, 1, 4, 2)
    sums = RunningSums()
    sums.read(k[:, :, :3], k[:, :, :3], torch.tensor([[True, True, True]]))
    changed = torch.tensor([[False, True, True, True]])
    assert torch.equal(sums.read(k, k, changed).keys, torch.full((1, 1, 2), 3.0))
    assert torch.equal(sums.read(k, k, None).keys, torch.full((1, 1, 2), 4.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "changes"), TAILED, ids=str)
def test_later_tokens_never_reach_the_tail_of_a_row(name: str, changes: dict[str, Any], backend: str) -> None:
    """Bit for bit: running sums must not depend on what follows."""
    mechanism = build(name, Pattern.CAUSAL_SELF, tail="mean", backend=backend, **changes).float()
    inputs = draw(mechanism, lengths=(140, 140), dtype=torch.float32)
    whole = attend(mechanism, inputs).out
    changed = replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())
    changed.k[:, :, 77:], changed.v[:, :, 77:] = 100.0, -100.0
    assert torch.equal(attend(mechanism, changed).out[:, :, :77], whole[:, :, :77])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0, 4), st.floats(0, 1), st.integers(0, 10_000))
def test_weights_are_a_distribution_and_the_tail_is_below_what_was_dropped(
    m: int, size: float, factor: float, seed: int
) -> None:
    """The mean score gives at most the dropped mass (Jensen), for factors up to 1."""
    scores = noise_like(torch.empty(1, 1, 5, m, dtype=torch.float64), seed=seed) * size
    kept = scores >= scores.amax(-1, keepdim=True) - 1
    weights = weigh_with_tail(scores, kept.double(), None, torch.tensor([factor], dtype=torch.float64))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 5, dtype=torch.float64))
    assert (weights >= 0).all()
    tail = (weights * ~kept).sum(-1)
    assert (tail <= (scores.softmax(-1) * ~kept).sum(-1) + 1e-12).all()


def test_the_tail_is_nearer_to_dense_attention_where_scores_are_flat() -> None:
    torch.manual_seed(0)
    dense = build("dense", Pattern.NONCAUSAL_SELF)
    inputs = draw(dense, lengths=(64, 64), spread=0.3)
    wanted = attend(dense, inputs).out
    found = {tail: attend(build("topk", dense.pattern, keys=6, tail=tail), inputs).out for tail in ("none", "mean")}
    off = {tail: (out - wanted).norm() for tail, out in found.items()}
    assert off["mean"] < 0.2 * off["none"]


def test_its_cost_is_a_few_vectors_a_token() -> None:
    mechanism = build("topk", Pattern.CAUSAL_SELF, keys=2, tail="mean")
    inputs = draw(mechanism, lengths=(11, 11), value_dim=5)
    call = padded(Pattern.CAUSAL_SELF, lengths=(11, 11))
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
    tokens = call.keys.sum(-1) + (11 if call.queries is None else call.queries.sum(-1))
    cost = count_tail_cost(x, x.pairs - 1)
    torch.testing.assert_close(cost, (tokens * (8 + 5)).float()[:, None].expand(2, 2))
    assert not count_tail_cost(x, x.pairs).any()
    without = attend(build("topk", Pattern.CAUSAL_SELF, keys=2, tail="none"), inputs, call).cost
    torch.testing.assert_close(attend(mechanism, inputs, call).cost.total - without.total, cost)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["topk", "latte", "smyrf"])
def test_a_kind_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tail must be one of none, mean; got 'exact'"):
        build_tail("exact", 2)  # type: ignore[arg-type]
    assert hyperparameters(find(name))["tail"] == ("none" if name == "smyrf" else "mean")
