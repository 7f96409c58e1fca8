"""Tiles by FlexAttention: its list of tiles, and on a CPU its outputs and gradients as far as PyTorch goes there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as private

from thresher.attention import Call, Pattern
from thresher.attention.blocks import Blocks, flex, gather
from thresher.attention.blocks.tiles import sum_tiles
from thresher.testing.inputs import Inputs, attend, draw, first, gradients, padded

SELF, CAUSAL, CROSS = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS
N = 200  # tokens: three whole tiles, and a ragged one
pytestmark = [
    pytest.mark.usefixtures("unchecked_shapes", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # from PyTorch itself
]
MOBA: dict[str, Any] = {"rank": "pooled", "top": 2}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget compiled code: eager FlexAttention compiles for each length, and PyTorch allows a few."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(pattern: Pattern, backend: Any, block: dict[str, Any], **options: Any) -> Blocks:
    sizes = {"queries": 64, "keys": 64, **block}
    options = {"estimate": {"bits": "exact"}, "gate": {"mode": "hard"}, "threshold": 0.5, "tail": "none", **options}
    return Blocks(2, 16, pattern, block=sizes, backend=backend, **options).double()


def build_both(pattern: Pattern, block: dict[str, Any], **options: Any) -> tuple[Blocks, Blocks]:
    return build(pattern, "reference", block, **options), build(pattern, "flex", block, **options)


def draw_peaked(mechanism: Blocks, lengths: tuple[int, int] = (N, N)) -> Inputs:
    """Draw inputs in which each example prefers some tiles, so that others are dropped."""
    inputs = draw(mechanism, lengths=lengths, groups=1, value_dim=24)
    liked = torch.randn(2, 1, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Inputs(inputs.q + 1, inputs.k + liked.repeat_interleave(64, 2)[:, :, : lengths[1]], inputs.v)


CASES = [
    (SELF, {}),
    (SELF, {"share": "union"}),
    (SELF, MOBA),
    (CAUSAL, {}),
    (CAUSAL, MOBA),
    (CROSS, {"rank": "learned"}),
    (Pattern.CAUSAL_CROSS, {"top": 1, "queries": 128}),
]


@pytest.mark.parametrize(("pattern", "block"), CASES, ids=str)
def test_outputs_and_costs_are_those_of_the_reference(
    pattern: Pattern, block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "PAIRS", 2 * 2 * 128 * N)  # two blocks at a time
    reference, own = build_both(pattern, block)
    n = 130 if pattern.cross else N
    inputs = draw_peaked(reference, (n, N))
    mask = padded(pattern, lengths=(n, N), left=True)
    with torch.no_grad():
        for call in (Call(), mask, Call(queries=first([70, n], n), keys=mask.keys)):
            wanted, got = (attend(each, inputs, call) for each in (reference, own))
            assert 0.1 < float(wanted.cost.kept.sum() / wanted.cost.visible.sum()) < 0.9
            torch.testing.assert_close(got.out, wanted.out, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.cost, wanted.cost, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("pattern", "block"), [(SELF, {}), (CAUSAL, MOBA)], ids=str)
def test_gradients_are_those_of_the_reference(
    pattern: Pattern, block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses gradients of FlexAttention on CPUs; its private check is taken out here, and only here."""
    reference, own = build_both(pattern, block)
    inputs = draw_peaked(reference)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        gradients(own, inputs)
    monkeypatch.setattr(private, "_validate_device", lambda *tensors: None)
    for call in (Call(), padded(pattern, lengths=(N, N), left=True)):
        (wanted, of_wanted), (got, of_got) = (gradients(each, inputs, call) for each in (reference, own))
        torch.testing.assert_close(got.out, wanted.out, rtol=1e-12, atol=1e-12)
        for name in "qkv":
            torch.testing.assert_close(of_got[name], of_wanted[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("pattern", "block"), CASES, ids=str)
def test_the_list_holds_the_tiles_that_a_block_keeps_and_no_other(pattern: Pattern, block: dict[str, Any]) -> None:
    """On a CPU PyTorch masks all pairs and reads no list, so the list itself is compared."""
    mechanism = build(pattern, "flex", block)
    inputs = draw_peaked(mechanism)
    call = padded(pattern, lengths=(N, N), left=True)
    size = mechanism.block.queries
    with torch.no_grad():
        x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
        keep, pairs, *_ = flex.choose_tiles(mechanism, x)
        mask = flex.build_block_mask(mechanism, x, keep, pairs)
        kept = mechanism.thresholds(mechanism.compare(x)[1], x.visible).keep
    of_blocks = sum_tiles(mechanism.sum_blocks(kept.int()), 64)
    assert torch.equal(mask.to_dense().bool(), of_blocks > 0)
    assert not (of_blocks > 0).all()
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks, (of_blocks == size * 64).sum(-1))
    if pattern is SELF and not block:
        assert mask.full_kv_num_blocks.any(), "tiles that need no mask"
    assert mask.shape == (2, 2, N, N)


@pytest.mark.slow
def test_generated_code_for_cpus_skips_tiles_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that torch.compile generates reads the list, as a wrong one shows; in fp32, without gradients."""
    monkeypatch.setattr(flex, "_find_function", lambda device: torch.compile(private.flex_attention))
    list_tiles, first_tile = flex._list_tiles, torch.arange(4) == 0
    for pattern, block in ((SELF, {}), (CAUSAL, MOBA)):
        reference, own = (each.float() for each in build_both(pattern, block))
        inputs = draw_peaked(reference)
        inputs = Inputs(*(x.float() for x in (inputs.q, inputs.k, inputs.v)))
        with torch.no_grad():
            for call in (Call(), padded(pattern, lengths=(N, N), left=True)):
                wanted, got = (attend(each, inputs, call).out for each in (reference, own))
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            with monkeypatch.context() as patched:
                patched.setattr(flex, "_list_tiles", lambda chosen: list_tiles(chosen & first_tile))
                assert not torch.allclose(attend(own, inputs).out, attend(reference, inputs).out, atol=0.1)


@pytest.mark.parametrize(
    ("block", "options", "call", "message"),
    [
        ({"keys": 32}, {}, Call(), "block.keys and block.queries of 64, 128, 256 only"),
        ({"queries": 48}, {}, Call(), "block.keys and block.queries of 64, 128, 256 only"),
        ({}, {"tail": "mean"}, Call(), "no tail and no dropout"),
        ({}, {"gate": {"mode": "ste"}}, Call(), "no gradient of thresholds; set gate.mode=hard"),
        ({}, {"estimate": {"scoring": "int8"}}, Call(), "by exact scores"),
        ({"heads": "shared"}, {}, Call(), "set block.heads=own"),
        ({"rank": "learned"}, {}, Call(), "needs a map of all pairs"),
        ({}, {}, Call(bias=torch.zeros(1, 2, 9, 9).double()), "no masks of pairs and no biases"),
    ],
    ids=str,
)
def test_what_it_cannot_compute_is_refused(
    block: dict[str, Any], options: dict[str, Any], call: Call, message: str
) -> None:
    mechanism = build(SELF, "flex", block, **options)
    inputs = draw(mechanism, lengths=(9, 9))
    with pytest.raises(ValueError, match=f"backend=flex cannot compute this call of Blocks: .*{message}"):
        attend(mechanism, inputs, call)


def test_narrow_heads_are_refused() -> None:
    narrow = Blocks(2, 8, SELF, block={"keys": 64}, backend="flex", gate={"mode": "hard"})
    with pytest.raises(ValueError, match="it needs heads of 16 numbers or more"):
        attend(narrow, draw(narrow))


def test_it_never_runs_unasked() -> None:
    mechanism = build(SELF, "auto", {})
    x = mechanism.prepare(*[torch.zeros(1, 2, 9, 16)] * 3, Call())
    refusal = flex.FlexAttention().explain_refusal(mechanism, x)
    assert refusal == "it runs only where backend=flex asks for it"
