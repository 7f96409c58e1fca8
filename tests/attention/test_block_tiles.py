"""Tiles of keys in blocks, and heads that vote together, against their definition in loops."""

from typing import Any

import pytest
import torch

from tests.attention.blocks_reference import attend_by_definition
from tests.attention.test_blocks import CROSS, SELF, blocks, generate_calls
from thresher.attention import Call, Pattern
from thresher.attention.blocks import Blocks, gather
from thresher.budget.calibration import ThresholdProbe, calibrate
from thresher.testing import checks, leaks
from thresher.testing.inputs import Inputs, attend, draw, gradients, padded

CAUSAL = Pattern.CAUSAL_SELF
EXACT: dict[str, Any] = {"estimate": {"bits": "exact"}}


@pytest.mark.parametrize(
    ("pattern", "n", "m", "options"),
    [
        (SELF, 23, 23, {"block": {"keys": 4}}),
        (SELF, 23, 23, {"block": {"keys": 4, "share": "union"}, "unit": "nats", "gate": {"into_scores": True}}),
        (CROSS, 20, 13, {"block": {"keys": 3, "every": 2}, "always_keep": 2}),
        (CROSS, 7, 31, {"block": {"keys": 4, "heads": "shared"}, "gate": {"into_scores": True}}),
        (CAUSAL, 19, 19, {"block": {"keys": 4}, "gate": {"into_scores": True}}),
        (CAUSAL, 13, 13, {"block": {"keys": 4, "heads": "shared"}, "tail": "mean"}),
        (Pattern.CAUSAL_CROSS, 9, 13, {"block": {"keys": 5, "heads": "shared"}, "unit": "nats", "threshold": 1.0}),
        (SELF, 23, 23, {"block": {"heads": "shared", "top": 3}, "gate": {"mode": "hard"}}),
        (CAUSAL, 19, 19, {"block": {"keys": 3, "top": 2}, "gate": {"mode": "hard"}, "always_keep": 1}),
    ],
    ids=str,
)
def test_tiles_are_those_of_the_definition(pattern: Pattern, n: int, m: int, options: dict[str, Any]) -> None:
    mechanism = blocks(pattern, **options)
    inputs = draw(mechanism, lengths=(n, m), groups=2, value_dim=5, spread=1.3)
    for call_name, call in generate_calls(pattern, n, m, 4).items():
        attended, found = gradients(mechanism, inputs, call, cost=0)
        got = found | {"out": attended.out, "kept": attended.cost.kept}
        got["macs"] = attended.cost.score + attended.cost.select
        for name, wanted in attend_by_definition(mechanism, inputs, call).items():
            if name not in got or (name == "macs" and mechanism.tail is not None):
                continue  # fixed thresholds; the MACs of a tail have a test of their own
            off = (got[name].detach().double() - wanted.double()).abs().max()
            assert off < 1e-9 * (1 + wanted.abs().max()), f"{name} is off by {off:.1e} with {call_name}"


def test_keys_of_a_tile_are_kept_together() -> None:
    mechanism = blocks(queries=4, block={"keys": 4}, always_keep=1).eval()
    inputs = draw(mechanism, lengths=(16, 16), spread=1.3)
    with torch.no_grad():
        difference = mechanism.compare(mechanism.prepare(inputs.q, inputs.k, inputs.v, Call()))[1]
        keep = mechanism.thresholds(difference, None, mechanism.always_keep).keep.unflatten(-1, (4, 4))
    assert (keep.any(-1) == keep.all(-1)).all()
    assert keep[..., 0, :].all(), "the whole tile of a key that is always kept"
    assert not keep.all()


def test_heads_that_share_keys_keep_nested_sets_of_them() -> None:
    mechanism = blocks(queries=4, block={"heads": "shared"}).eval()
    inputs = draw(mechanism, lengths=(16, 16), groups=2, spread=1.3)
    with torch.no_grad():
        difference = mechanism.compare(mechanism.prepare(inputs.q, inputs.k, inputs.v, Call()))[1]
    assert torch.equal(difference[:, 0], difference[:, 1])
    assert torch.equal(difference[:, 2], difference[:, 3])
    assert not torch.equal(difference[:, 1], difference[:, 2])
    alone = Inputs(inputs.q, inputs.k.repeat_interleave(2, 1), inputs.v.repeat_interleave(2, 1))
    own = attend(blocks(queries=4, backend="reference").eval(), alone)
    assert torch.equal(attend(mechanism, alone).out, own.out), "a head that shares its keys with none votes alone"


@pytest.mark.parametrize(("pattern", "share"), [(SELF, "vote"), (SELF, "union"), (CAUSAL, "union")], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"block": {"keys": 3}, "tail": "mean"},
        {"block": {"keys": 3, "top": 2}, "gate": {"mode": "hard"}},
        {"block": {"keys": 3, "rank": "pooled"}},
    ],
    ids=str,
)
def test_gathered_tiles_give_the_same(
    pattern: Pattern, share: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if share == "vote" and options["block"].get("rank"):
        share = "auto"
    monkeypatch.setattr(gather, "PAIRS", 2 * 4 * 10 * 23)
    options = options | {"block": {**options["block"], "share": share}}
    reference, gathered = (blocks(pattern, backend=backend, **options) for backend in ("reference", "gather"))
    inputs = draw(reference, lengths=(23, 23), groups=2, value_dim=5, spread=1.3)
    for call in (Call(), padded(pattern, lengths=(23, 23), left=True)):
        (wanted, of_wanted), (got, of_got) = (gradients(each, inputs, call) for each in (reference, gathered))
        torch.testing.assert_close(got.out, wanted.out, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.cost, wanted.cost, rtol=1e-6, atol=0)
        for name, gradient in of_wanted.items():
            torch.testing.assert_close(of_got[name], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{"block": {"keys": 4}}, {"block": {"keys": 4, "rank": "pooled"}}], ids=str)
@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_calibration_on_random_rows_finds_the_share_of_all(pattern: Pattern, options: dict[str, Any]) -> None:
    """Each row has its own tile, wherever it stands among the rows that were drawn."""
    mechanism = blocks(pattern, queries=8, **options)
    inputs = draw(mechanism, lengths=(96, 96), spread=1.3)
    probe = ThresholdProbe(torch.nn.ModuleDict({"attention": mechanism}), pairs=2 * 96 * 48)
    torch.manual_seed(0)
    probe.level = 0.3
    for _ in range(8):
        mechanism(inputs.q, inputs.k, inputs.v, Call())
    probe.level = None
    mechanism.thresholds.set_base(probe.collect()["attention"])
    cost = attend(mechanism.eval(), inputs).cost
    assert abs(float((cost.kept.sum() / cost.visible.sum()).detach()) - 0.3) < 0.02


@pytest.mark.parametrize("keys", [2, 3])
def test_a_cache_that_slides_moves_tiles(keys: int) -> None:
    mechanism = Blocks(2, 8, CAUSAL, threshold=0.3, block={"queries": 4, "keys": keys}, **EXACT)
    assert not mechanism.slides
    leaks.check_sliding_is_declared(mechanism)
    assert Blocks(2, 8, CAUSAL).slides


@pytest.mark.parametrize(
    "options",
    [
        {"block": {"keys": 3}},
        {"block": {"keys": 3, "rank": "pooled"}},
        {"block": {"keys": 3, "rank": "pooled", "top": 2}, "gate": {"mode": "hard"}},
        {"block": {"keys": 3, "rank": "learned", "top": 2}, "gate": {"mode": "hard"}},
        {"block": {"keys": 3}, "estimate": {"bits": 4}},
    ],
    ids=str,
)
def test_decoding_continues_with_the_tiles_of_the_sequence(options: dict[str, Any]) -> None:
    mechanism = blocks(CAUSAL, heads=2, queries=2, **options)
    checks.check_decoding_continues_the_sequence(mechanism)
    leaks.check_whole_masks_are_followed(mechanism)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": {"keys": 0}}, "block.keys must be a whole number, at least 1; got 0"),
        ({"block": {"rank": "pooled"}}, "block.rank=pooled ranks tiles of several keys: set block.keys"),
        ({"block": {"rank": "pooled", "keys": 4, "share": "vote"}}, "each query chooses its own tiles"),
        ({"block": {"rank": "learned", "keys": 4, "every": 2}}, "are for block.rank=votes, not learned"),
        ({"block": {"rank": "pooled", "keys": 4, "heads": "shared"}}, "are for block.rank=votes, not pooled"),
        (
            {"block": {"rank": "pooled", "keys": 4}, "estimate": {"bits": 4}},
            "has no estimates of scores",
        ),
        ({"block": {"rank": "learned", "keys": 4}, "gate": {"into_scores": True}}, "from its auxiliary loss alone"),
        ({"block": {"top": 2}}, "no threshold to train: set gate.mode=hard"),
        ({"block": {"top": 2}, "gate": {"mode": "hard"}, "threshold": float("inf")}, "threshold=.inf keeps everything"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Blocks(2, 8, SELF, **(EXACT | options))


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_kernels_refuse_tiles_by_name(pattern: Pattern) -> None:
    for block, name in (({"keys": 4}, "block.keys=4"), ({"heads": "shared"}, "block.heads=shared")):
        mechanism = Blocks(2, 8, pattern, block=block, backend="cpu").eval()
        for n in (9, 1) if pattern is CAUSAL else (9,):
            inputs = draw(mechanism, lengths=(n, 9), dtype=torch.float32)
            with torch.no_grad(), pytest.raises(ValueError, match=f"backend=cpu cannot compute .*: it has no {name}"):
                attend(mechanism, inputs)
    shared = Blocks(2, 8, pattern, block={"heads": "shared"}, backend="gather")
    with pytest.raises(ValueError, match="each head choose alone"):
        attend(shared, draw(shared))


def test_a_number_of_tiles_leaves_nothing_to_calibrate() -> None:
    mechanism = blocks(block={"top": 2}, gate={"mode": "hard"})
    inputs = draw(mechanism, lengths=(9, 9))
    model = torch.nn.ModuleDict({"attention": mechanism})
    with pytest.raises(ValueError, match="has no thresholds to calibrate"):
        calibrate(model, [inputs], 0.3, forward=lambda batch: mechanism(batch.q, batch.k, batch.v, Call()))
    with pytest.raises(ValueError, match=r"block\.top=2 fixes how many tiles a row keeps"):
        mechanism.measure_differences(inputs.q, inputs.k, Call())
