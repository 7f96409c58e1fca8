"""SMYRF's tail against its definition: plain PyTorch in fp64 over all pairs, with the clusters given."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.shared.functional import expand_heads
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

SELF, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
SIZES = [(p, n, m) for p in Pattern for n, m in ((23, 23), (24, 31), (40, 9)) if p.cross or n == m]
DECODING = [(CAUSAL, 7, 30), (CAUSAL, 1, 23)]


def smyrf(pattern: Pattern, heads: int = 2, **options: Any) -> Smyrf:
    torch.manual_seed(0)
    built = Smyrf(heads, 8, pattern, **{"cluster": 4, "tail": "mean"} | options).double().eval()
    if built.tail is not None:
        with torch.no_grad():
            built.tail.factor.copy_(torch.linspace(0.6, 1.3, heads))
    return built


def count_meetings(mechanism: Smyrf, q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Count how often each visible pair counts, [b, h, n, m]."""
    x = mechanism.prepare(q, k, k, call)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for part in mechanism.assign(x.q.flatten(0, 1), x.k.flatten(0, 1), x):
        met = part.query_cluster[..., :, None] == part.key_cluster[..., None, :]
        total += met.sum(0).view(x.shape) * (mechanism.rounds if part.causal else 1)
    total *= mechanism.visible(q, k, call)
    return total.clamp_max(1) if mechanism.dedup == "count" else total


def attend_by_definition(mechanism: Smyrf, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Compute the output and the gradients of `gradients(cost=0)`."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}
    if call.bias is not None:
        leaves["bias"] = call.bias.detach().clone().requires_grad_()
    assert mechanism.tail is not None
    leaves["tail.factor"] = mechanism.tail.factor.detach().clone().requires_grad_()
    visible = mechanism.visible(inputs.q, inputs.k, call)
    times = count_meetings(mechanism, inputs.q, inputs.k, call)
    dropped = (visible & (times == 0)).double()
    k, v = (expand_heads(leaves[name], mechanism.num_heads) for name in "kv")
    scores = leaves["q"] @ k.mT * 8**-0.5 + leaves.get("bias", 0)
    scores = scores.masked_fill(~visible, 0)
    mean = (scores * dropped).sum(-1, keepdim=True) / dropped.sum(-1, keepdim=True).clamp_min(1)
    top = torch.maximum(scores.amax(-1, keepdim=True), mean).detach()
    t = leaves["tail.factor"][:, None, None] * (mean - top).exp()
    weights = times * (scores - top).exp() + t * dropped
    out = weights @ v / weights.sum(-1, keepdim=True).masked_fill(~visible.any(-1, keepdim=True), 1)
    found = torch.autograd.grad((out * noise_like(out)).sum(), list(leaves.values()))
    return {"out": out, **dict(zip(leaves, found, strict=True))}


def generate_calls(pattern: Pattern, n: int, m: int, heads: int) -> dict[str, Call]:
    bias = noise_like(torch.empty(1, heads, n, m, dtype=torch.float64))
    pairs = noise_like(torch.empty(2, heads, n, m)) > -0.7
    pairs[0, :, n // 2] = False
    calls = {
        "plain": Call(),
        "bias": Call(bias=bias),
        "pairs with an empty row": Call(pairs=pairs),
        "shared pairs and bias": Call(pairs=pairs[1:, :1], bias=bias[:, :1]),
        "scattered keys": Call(keys=noise_like(torch.empty(2, m), seed=5) > -0.5),
    }
    if pattern.cross or n == m:
        calls |= {
            "padding": padded(pattern, lengths=(n, m)),
            "left padding and bias": replace(padded(pattern, lengths=(n, m), left=True), bias=bias),
            "hidden queries": Call(queries=noise_like(torch.empty(2, n), seed=6) > -0.5),
        }
    else:
        slots = torch.arange(n)[None] + m // 2
        calls["slots"] = Call(pairs=(torch.arange(m) <= slots[..., None])[:, None], slots=slots, whole_mask=True)
    return calls


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dedup", ["none", "count"])
@pytest.mark.parametrize(("pattern", "n", "m"), [*SIZES, *DECODING], ids=str)
def test_outputs_and_gradients_are_those_of_the_definition(
    pattern: Pattern, n: int, m: int, dedup: str, rounds: int, backend: str
) -> None:
    """Equal widths of keys and values take PyTorch's fused attention, different ones do not."""
    mechanism = smyrf(pattern, heads=4, rounds=rounds, dedup=dedup, backend=backend)
    inputs = draw(mechanism, lengths=(n, m), groups=2, value_dim=8 if rounds == 1 or m % 2 else 5, spread=1.3)
    for call_name, call in generate_calls(pattern, n, m, 4).items():
        attended, found = gradients(mechanism, inputs, call, cost=0)
        for name, wanted in attend_by_definition(mechanism, inputs, call).items():
            got = attended.out if name == "out" else found[name]
            assert got is not None
            off = (got - wanted).abs().max()
            assert off < 1e-9 * (1 + wanted.abs().max()), f"{name} is off by {off:.1e} with {call_name}"


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_row_that_drops_nothing_has_no_tail_although_hashing_runs(pattern: Pattern, rounds: int) -> None:
    mechanism = smyrf(pattern, cluster=4, rounds=rounds)
    inputs = draw(mechanism, lengths=(9, 9))
    call = Call(keys=first([4, 2], 9))
    attended, found = gradients(mechanism, inputs, call, cost=0)
    for name, reference in softmax_attention(mechanism, inputs, call).items():
        assert_close(attended.out if name == "out" else found[name], reference, atol=1e-12, rtol=1e-12)
    assert not found["tail.factor"].any()  # type: ignore[union-attr]
    without = attend(smyrf(pattern, cluster=4, rounds=rounds, tail="none"), inputs, call)
    assert torch.equal(attended.cost.select, without.cost.select)


def test_a_row_that_meets_no_visible_key_gets_the_mean_of_its_values() -> None:
    mechanism = smyrf(SELF)
    inputs = draw(mechanism, lengths=(16, 16))
    pairs = count_meetings(mechanism, inputs.q, inputs.k, Call()) == 0
    attended, found = gradients(mechanism, inputs, Call(pairs=pairs), cost=0)
    wanted = pairs.double() @ inputs.v / pairs.sum(-1, keepdim=True)
    assert_close(attended.out, wanted, atol=1e-12, rtol=1e-12)
    assert all(each is not None and each.isfinite().all() for each in found.values())
    assert not attended.cost.kept.any()


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_dropped_keys_far_above_the_met_ones_are_no_obstacle(pattern: Pattern) -> None:
    for factor in (0.0, 1.0):
        mechanism = smyrf(pattern).float()
        with torch.no_grad():
            mechanism.tail.factor.fill_(factor)  # type: ignore[union-attr]
        inputs = draw(mechanism, lengths=(24, 24), dtype=torch.float32)
        met = count_meetings(mechanism, inputs.q, inputs.k, Call())
        bias = torch.where(met > 0, -500.0, 500.0)
        attended, found = gradients(mechanism, inputs, Call(bias=bias), cost=0)
        assert attended.out.isfinite().all()
        assert all(each is not None and each.isfinite().all() for each in found.values())
        if factor:
            dropped = mechanism.visible(inputs.q, inputs.k, Call()) & (met == 0)
            some = dropped.any(-1)
            wanted = dropped.float() @ inputs.v / dropped.sum(-1, keepdim=True).clamp_min(1)
            assert_close(attended.out[some], wanted[some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", Pattern)
def test_dropout_keeps_the_weight_of_the_tail(pattern: Pattern) -> None:
    """Met keys are dropped as they are without a tail; all of them here."""
    mechanism = smyrf(pattern, resample="never").train()
    inputs = draw(mechanism, lengths=(24, 24))
    mechanism.dropout = 1.0
    only_tail = attend(mechanism, inputs).out
    mechanism.dropout = 0.0
    dropped = mechanism.visible(inputs.q, inputs.k, Call()) & (
        count_meetings(mechanism, inputs.q, inputs.k, Call()) == 0
    )
    one_hot = replace(inputs, v=torch.eye(24, dtype=torch.float64).expand(2, 2, 24, 24))
    weights = attend(mechanism, one_hot).out * dropped
    assert_close(only_tail, weights @ inputs.v, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_saved_memory_grows_with_the_length_not_with_its_square(pattern: Pattern) -> None:
    small, large = (count_saved_bytes(Smyrf(2, 8, pattern, cluster=16, tail="mean"), n) for n in (1024, 2048))
    assert 1.8 < large / small < 2.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_those_of_fp32(dtype: torch.dtype) -> None:
    mechanism = smyrf(CAUSAL, cluster=16).float()
    inputs = draw(mechanism, lengths=(2048, 2048), batch=1, dtype=dtype)
    inputs = replace(inputs, v=(inputs.v + 30).to(dtype))  # a sum of 2,048 such values exceeds fp16 and bf16's digits
    wide = Inputs(*(x.float() for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(mechanism, inputs).out, attend(mechanism, wide).out.to(dtype))
