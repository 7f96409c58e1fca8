"""The tail against its definition: dropped keys weigh by their mean score, times a factor of the head."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern, find, hyperparameters
from thresher.attention.shared.tail import build_tail, count_tail_cost, sum_visible, weigh_with_tail
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

TAILED: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"keys": 0.3}),
    ("topk", {"keys": 2, "chunk": 3}),
    ("latte", {"threshold": 0.5}),
    ("latte", {"threshold": 1.0, "unit": "nats", "always_keep": 1}),
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
    without = build(name, Pattern.CAUSAL_SELF, backend=backend, **changes)
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
@pytest.mark.parametrize(("name", "changes"), [("topk", {"keys": 1.0}), ("latte", {"threshold": float("inf")})])
def test_nothing_dropped_is_softmax_attention(name: str, changes: dict[str, Any], pattern: Pattern) -> None:
    for backend in BACKENDS:
        mechanism = build(name, pattern, tail="mean", backend=backend, **changes)
        inputs = draw(mechanism, lengths=(9, 14) if pattern.cross else (14, 14))
        one = attend(mechanism, inputs)
        torch.testing.assert_close(one.out, attend(build("dense", pattern), inputs).out)
        assert torch.equal(one.cost.select, attend(build(name, pattern, **changes), inputs).cost.select)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("masked", ["nothing", "padding", "left", "pairs"])
def test_sums_are_those_of_the_visible_pairs(pattern: Pattern, masked: str) -> None:
    mechanism = build("topk", pattern)
    lengths = (7, 13) if pattern.cross else (13, 13)
    inputs = draw(mechanism, lengths=lengths)
    call = {
        "nothing": Call(),
        "padding": padded(pattern, lengths=lengths),
        "left": padded(pattern, lengths=lengths, left=True),
        "pairs": Call(pairs=noise_like(torch.empty(2, 1, *lengths)) > 0),
    }[masked]
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
    visible = torch.ones(2, 2, *lengths) if x.visible is None else x.visible.expand(2, 2, *lengths).double()
    scores, values, number = sum_visible(x)
    rows = visible.any(-1)
    torch.testing.assert_close(number, visible.double().sum(-1))
    torch.testing.assert_close(scores[rows], (x.scores() * visible).sum(-1)[rows])
    torch.testing.assert_close(values.expand_as(x.q)[rows], (visible.double() @ x.v)[rows])


def test_later_tokens_never_reach_the_sums_of_a_row() -> None:
    """Bit for bit: running sums must not depend on what follows."""
    mechanism = build("topk", Pattern.CAUSAL_SELF).float()
    inputs = draw(mechanism, lengths=(300, 300), dtype=torch.float32)
    whole = sum_visible(mechanism.prepare(inputs.q, inputs.k, inputs.v, Call()))
    for n in (1, 63, 128, 299):
        part = inputs.first(n)
        sums = sum_visible(mechanism.prepare(part.q, part.k, part.v, Call()))
        assert torch.equal(sums.values, whole.values[:, :, :n]) or n == 1
        torch.testing.assert_close(sums.scores, whole.scores[:, :, :n])


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
    without = attend(build("topk", Pattern.CAUSAL_SELF, keys=2), inputs, call).cost
    torch.testing.assert_close(attend(mechanism, inputs, call).cost.total - without.total, cost)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["topk", "latte"])
def test_a_kind_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tail must be one of none, mean; got 'exact'"):
        build_tail("exact", 2)  # type: ignore[arg-type]
    assert hyperparameters(find(name))["tail"] == "none"
