"""Blocks against their definition: loops over blocks in fp64, and LATTE where rows choose for themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.blocks_reference import attend_by_definition
from thresher.attention import Call, Pattern
from thresher.attention.blocks import Blocks, gather
from thresher.attention.latte import Latte
from thresher.budget.calibration import calibrate, draw_rows
from thresher.testing.inputs import (
    Inputs,
    attend,
    count_saved_bytes,
    disturb,
    draw,
    first,
    gradients,
    noise_like,
    padded,
)

SELF, CROSS = Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS


def blocks(pattern: Pattern = SELF, heads: int = 4, queries: int = 5, **options: Any) -> Blocks:
    options = {"threshold": 0.5, "tail": "none", "estimate": {"bits": "exact"}, **options}
    block = {"queries": queries, **options.pop("block", {})}
    built = Blocks(heads, 8, pattern, block=block, **options).double()
    with torch.no_grad():
        built.thresholds.base.mul_(torch.linspace(0.7, 1.6, heads))
        built.thresholds.eval_base.copy_(built.thresholds.base)
        if built.tail is not None:
            built.tail.factor.copy_(torch.linspace(0.6, 1.3, heads))
    return built


def generate_calls(pattern: Pattern, n: int, m: int, heads: int) -> dict[str, Call]:
    bias = noise_like(torch.empty(1, heads, n, m, dtype=torch.float64))
    pairs = noise_like(torch.empty(2, heads, n, m)) > -0.3
    pairs[0, :, n // 2] = False
    return {
        "plain": Call(),
        "bias": Call(bias=bias),
        "padding": padded(pattern, lengths=(n, m)),
        "left padding": padded(pattern, lengths=(n, m), left=True),
        "hidden queries": Call(queries=noise_like(torch.empty(2, n), seed=6) > 0),
        "pairs with an empty row": Call(pairs=pairs, bias=bias),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "nats", "gate": {"into_scores": True}},
        {"gate": {"into_scores": True}, "tail": "mean"},
        {"tail": "mean", "always_keep": 2, "block": {"every": 3}},
        {"unit": "nats", "threshold": 1.5, "block": {"every": 2}},
    ],
    ids=str,
)
@pytest.mark.parametrize(("pattern", "n", "m"), [(SELF, 23, 23), (CROSS, 20, 13), (CROSS, 7, 31)], ids=str)
def test_votes_are_those_of_the_definition(pattern: Pattern, n: int, m: int, options: dict[str, Any]) -> None:
    mechanism = blocks(pattern, **options)
    inputs = draw(mechanism, lengths=(n, m), groups=2, value_dim=5, spread=1.3)
    for call_name, call in generate_calls(pattern, n, m, 4).items():
        attended, found = gradients(mechanism, inputs, call, cost=0)
        cost = attended.cost
        got = found | {"out": attended.out, "kept": cost.kept, "macs": cost.score + cost.select}
        if mechanism.tail is not None:
            tokens = sum(x.sum(-1).expand(2, 4) for x in _find_seen(mechanism, inputs, call))
            got["macs"] = got["macs"] - tokens * (8 + 5) * (cost.kept < cost.visible)
        for name, wanted in attend_by_definition(mechanism, inputs, call).items():
            off = (got[name].detach().double() - wanted.double()).abs().max()
            assert off < 1e-9 * (1 + wanted.abs().max()), f"{name} is off by {off:.1e} with {call_name}"


def _find_seen(mechanism: Blocks, inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    visible = mechanism.visible(inputs.q, inputs.k, call)
    return visible.any(-1), visible.any(-2)


@pytest.mark.parametrize("pattern", Pattern)
def test_a_union_has_the_outputs_and_gradients_of_latte(pattern: Pattern) -> None:
    options: dict[str, Any] = {"threshold": 0.4, "tail": "mean", "gate": {"into_scores": True, "surrogate": "compact"}}
    union = Blocks(4, 8, pattern, block={"queries": 4, "share": "union"}, **options).double()
    latte = Latte(4, 8, pattern, backend="reference", **options).double()
    inputs = draw(union, lengths=(19, 19), groups=2, spread=1.3)
    for call in (Call(), padded(pattern, lengths=(19, 19))):
        (got, of_got), (wanted, of_wanted) = (gradients(each, inputs, call, cost=0) for each in (union, latte))
        assert torch.equal(got.out, wanted.out)
        assert torch.equal(got.cost.kept, wanted.cost.kept)
        assert got.cost.score.sum() > wanted.cost.score.sum(), "a block computes more than its rows chose"
        assert all(torch.equal(of_got[name], of_wanted[name]) for name in of_wanted)


@pytest.mark.parametrize(("size", "pairs"), [(1, 4), (2, 5), (3, 4), (100, 5)])
def test_a_union_is_charged_for_all_that_its_block_computes(size: int, pairs: int) -> None:
    """Of four causal rows the first three choose key 0, the last one key 3; rows compute what they see of the union."""
    union = Blocks(
        1,
        2,
        Pattern.CAUSAL_SELF,
        block={"queries": size},
        unit="nats",
        threshold=1.0,
        estimate={"bits": "exact"},
        gate={"mode": "hard"},
    )
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None] * 9
    k = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])[None, None] * 9
    cost = attend(union, Inputs(q, k, k.clone(), None)).cost
    assert float(cost.kept) == 4
    assert float(cost.value) == 2 * pairs


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS])
def test_a_vote_where_later_queries_would_decide_is_refused(pattern: Pattern) -> None:
    for block in ({"share": "vote"}, {"every": 2}):
        with pytest.raises(ValueError, match=r"later queries .* block\.share=union"):
            Blocks(2, 8, pattern, block=block)
    assert not Blocks(2, 8, pattern).votes, "auto is a union here"


def test_a_vote_of_one_row_is_latte() -> None:
    options: dict[str, Any] = {"unit": "nats", "threshold": 1.1}
    inputs = draw(blocks(), lengths=(17, 17), spread=1.3)
    voted = attend(Blocks(4, 8, SELF, block={"queries": 1}, **options).double(), inputs)
    alone = attend(Latte(4, 8, SELF, backend="reference", **options).double(), inputs)
    torch.testing.assert_close(voted.out, alone.out, rtol=1e-12, atol=1e-12)
    assert torch.equal(voted.cost.kept, alone.cost.kept)


def test_rows_of_one_block_keep_the_same_keys_and_other_blocks_do_not_matter() -> None:
    mechanism = blocks(queries=4).eval()
    inputs = draw(mechanism, lengths=(16, 16), spread=1.3)
    before = attend(mechanism, inputs).out
    changed = torch.arange(16) == 6
    after = attend(mechanism, disturb(inputs, changed.expand(2, 4, 16), torch.zeros(2, 4, 16).bool(), 3.0)).out
    moved = (before != after).any(-1).any(0).any(0)
    assert moved[4:8].all(), "rows of the block depend on its votes"
    assert not moved[:4].any()
    assert not moved[8:].any()


def test_hidden_queries_have_no_vote() -> None:
    mechanism = blocks(queries=4).eval()
    inputs = draw(mechanism, lengths=(16, 16), spread=1.3)
    call = Call(queries=first([6, 9], 16), keys=None)
    hidden = ~call.queries[:, None].expand(2, 4, 16)
    before = attend(mechanism, inputs, call).out
    after = attend(mechanism, disturb(inputs, hidden, torch.zeros(2, 4, 16).bool(), 30.0), call).out
    assert torch.equal(before, after)


def test_random_rows_of_a_calibration_are_whole_blocks() -> None:
    for n, number, together in ((100, 40, 8), (7, 3, 64), (20, 1, 6)):
        rows = draw_rows(n, number, together, torch.device("cpu"))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert all(set(range(b * together, min((b + 1) * together, n))) <= set(rows.tolist()) for b in rows // together)


def test_calibrated_thresholds_keep_their_share() -> None:
    mechanism = blocks(queries=8)
    inputs = draw(mechanism, lengths=(64, 64), spread=1.3)
    calibrate(
        torch.nn.ModuleDict({"attention": mechanism}),
        [inputs],
        0.25,
        forward=lambda batch: mechanism(batch.q, batch.k, batch.v, Call()),
    )
    cost = attend(mechanism.eval(), inputs).cost
    assert abs(float((cost.kept.sum() / cost.visible.sum()).detach()) - 0.25) < 0.02


GATHERED: list[dict[str, Any]] = [
    {},
    {"tail": "mean"},
    {"tail": "mean", "always_keep": 2, "unit": "nats", "threshold": 1.1},
    {"estimate": {"bits": 4}, "gate": {"mode": "hard"}},
    {"block": {"every": 3}},
]


@pytest.mark.parametrize(
    ("pattern", "share", "options"),
    [
        *((pattern, "union", options) for pattern in Pattern for options in GATHERED[:4]),
        *((pattern, "vote", options) for pattern in (SELF, CROSS) for options in GATHERED),
    ],
    ids=str,
)
def test_gathered_keys_give_the_same(
    pattern: Pattern, share: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks at a time: 8 groups, 10 rows of 23 keys."""
    monkeypatch.setattr(gather, "PAIRS", 2 * 4 * 10 * 23)
    options = options | {"block": {"share": share, **options.get("block", {})}}
    reference, gathered = (blocks(pattern, backend=backend, **options) for backend in ("reference", "gather"))
    for n in (23, 7) if pattern is not SELF else (23,):
        inputs = draw(reference, lengths=(n, 23), groups=2, value_dim=5, spread=1.3)
        calls = [Call()]
        if n == 23:
            calls += [padded(pattern, lengths=(n, 23), left=left) for left in (False, True)]
        for call in calls:
            (wanted, of_wanted), (got, of_got) = (gradients(each, inputs, call) for each in (reference, gathered))
            torch.testing.assert_close(got.out, wanted.out, rtol=1e-9, atol=1e-12)
            for name, one, other in zip(got.cost._fields, got.cost, wanted.cost, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
            for name, gradient in of_wanted.items():
                torch.testing.assert_close(of_got[name], gradient, rtol=1e-8, atol=1e-9)


def test_gathering_takes_memory_linear_in_tokens() -> None:
    """What backward keeps doubles with the number of tokens, while a map of pairs quadruples."""
    mechanism = Blocks(2, 16, SELF, threshold=0.2, backend="gather").train()
    assert count_saved_bytes(mechanism, 2048) < 2.2 * count_saved_bytes(mechanism, 1024)
    whole = Blocks(2, 16, SELF, threshold=0.2, backend="reference").train()
    assert count_saved_bytes(whole, 1024) > 10 * count_saved_bytes(mechanism, 1024)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"estimate": {"scoring": "int8"}}, Call(), "exact scores"),
        ({"gate": {"into_scores": True}}, Call(), "into_scores=false"),
        ({"gate": {"surrogate": "compact"}}, Call(), "dropped keys; set inside"),
        ({}, Call(bias=torch.zeros(1, 4, 9, 9, dtype=torch.float64)), "no biases"),
    ],
    ids=str,
)
def test_what_gathering_cannot_compute_is_refused(options: dict[str, Any], call: Call, message: str) -> None:
    mechanism = blocks(backend="gather", **options)
    inputs = draw(mechanism, lengths=(9, 9))
    with pytest.raises(ValueError, match=f"backend=gather cannot compute this call of Blocks: .*{message}"):
        attend(mechanism, inputs, call)


def test_a_backend_that_a_mechanism_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton; got 'gather'"):
        Latte(2, 8, SELF, backend="gather")
