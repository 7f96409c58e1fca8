"""Calibrated thresholds keep the share of pairs that they were asked to keep."""

import math
import re

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from thresher import ComputeMeter, sparsify
from thresher.attention import Call, Mechanism, Pattern, find
from thresher.attention.shared.thresholds import Differences, Thresholds, named_thresholds
from thresher.budget.calibration import (
    ThresholdProbe,
    calibrate,
    compute_quantile,
    evaluation_mode,
    is_noisy,
    select_queries,
)
from thresher.testing.inputs import first, noise_like


def differences(*shape: int) -> Tensor:
    scores = noise_like(torch.empty(shape, dtype=torch.float64), 3.0)
    return scores.amax(-1, keepdim=True) - scores


def vit(**hyperparameters: object) -> nn.Module:
    """A small timm ViT with sparse attention, and weights large enough that keys differ."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += noise_like(parameter, 0.2)
    sparsify(model, "latte", **hyperparameters)
    return model.eval()


def batches(count: int = 2) -> list[Tensor]:
    return [noise_like(torch.empty(8, 1, 28, 28), seed=seed) for seed in range(count)]


def kept_by_heads(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return the share of visible pairs that each head of each layer keeps."""
    kept: dict[str, list[Tensor]] = {}
    mechanisms = {name: m for name, m in model.named_modules() if isinstance(m, Mechanism)}
    handles = [
        m.register_forward_hook(
            lambda _m, _i, attended, name=name: kept.setdefault(name, []).append(
                attended.cost.kept / attended.cost.visible
            )
        )
        for name, m in mechanisms.items()
    ]
    with torch.no_grad():
        for batch in inputs:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(shares).mean(0) for name, shares in kept.items()}


@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("mask", ["none", "padded", "by head"])
def test_the_quantile_is_the_smallest_difference_that_keeps_the_share(mask: str, kept: float) -> None:
    difference = differences(2, 3, 4, 5)
    visible = {
        "none": None,
        "padded": first([5, 2], 5)[:, None, None, :],
        "by head": noise_like(difference, seed=1) > 0.3,
    }[mask]
    quantile = compute_quantile(difference, visible, kept)
    assert quantile.dtype == torch.float32
    shown = torch.ones_like(difference).bool() if visible is None else visible.expand_as(difference)
    for head in range(3):
        seen = sorted(difference[:, head][shown[:, head]].tolist())
        rank = max(1, round(kept * len(seen)))
        assert quantile[head].item() == pytest.approx(seen[rank - 1], rel=1e-6)


def test_a_head_without_a_visible_pair_has_no_quantile() -> None:
    visible = torch.ones(1, 3, 1, 5, dtype=torch.bool)
    visible[:, 1] = False
    quantile = compute_quantile(differences(2, 3, 4, 5), visible, 0.5)
    assert quantile.isnan().tolist() == [False, True, False]


def test_hidden_pairs_do_not_move_the_quantile() -> None:
    difference, visible = differences(2, 3, 4, 5), first([5, 2], 5)[:, None, None, :]
    wanted = compute_quantile(difference, visible, 0.4)
    for junk in (math.nan, math.inf, -7.0):
        assert torch.equal(compute_quantile(difference.masked_fill(~visible, junk), visible, 0.4), wanted)


@pytest.mark.parametrize("kept", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("est_bits", [4, "exact"])
def test_calibrated_heads_keep_the_share_asked_for(est_bits: int | str, kept: float) -> None:
    """The second pass reads deep layers behind sparse ones."""
    model = vit(estimate={"bits": est_bits})
    before = kept_by_heads(model, batches())
    for _ in range(2):
        found = calibrate(model, batches(), kept)
    after = kept_by_heads(model, batches())
    assert list(found) == list(before)
    assert len(after) == 2
    for name, shares in after.items():
        assert shares.tolist() == pytest.approx([kept] * 2, abs=0.02), name
    assert not torch.allclose(torch.stack([*before.values()]), torch.stack([*after.values()]), atol=0.02)


def test_calibration_returns_the_thresholds_it_set_and_clears_offsets() -> None:
    model = vit()
    thresholds = dict(named_thresholds(model))
    with torch.no_grad():
        for m in thresholds.values():
            m.offset.fill_(0.5)
    found = calibrate(model, batches(), 0.3)
    assert set(found) == set(thresholds)
    for name, m in thresholds.items():
        assert torch.equal(found[name], m.values())
        assert not m.offset.any()
        assert m.offset.requires_grad


def test_all_pairs_are_kept_if_all_are_asked_for() -> None:
    model = vit(estimate={"bits": "exact"}, threshold=0.0)
    for _ in range(2):
        calibrate(model, batches(1), 1.0)
    assert all((shares == 1).all() for shares in kept_by_heads(model, batches(1)).values())


def test_a_batch_may_be_run_in_any_way() -> None:
    model, other = vit(), vit()
    calibrate(model, batches(), 0.3)
    calibrate(other, [{"image": x} for x in batches()], 0.3, forward=lambda batch: other(batch["image"]))
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_mapping_names_the_arguments_of_the_model() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config).eval()
    sparsify(model, "latte")
    ids = torch.arange(20).view(2, 10)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).masked_fill(ids % 10 > 6, 0)}
    (found,) = calibrate(model, [batch], 0.3).values()
    assert found.isfinite().all()
    with ComputeMeter(model) as meter, torch.no_grad():
        model(**batch)
    assert float(meter.kept().detach()) == pytest.approx(0.3, abs=0.03)


def test_the_way_to_run_a_batch_need_not_return_anything() -> None:
    model, other = vit(), vit()

    def run(batch: Tensor) -> None:
        other(batch)

    calibrate(model, batches(), 0.3)
    calibrate(other, batches(), 0.3, forward=run)
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


class OneHeadHidden(nn.Module):
    """Thresholds of two heads, of which the second never sees a pair."""

    rows_together = 1

    def __init__(self) -> None:
        super().__init__()
        self.thresholds = Thresholds(2, initial=3.0, tau=0.5, trainable=True)
        self.pattern = Pattern.NONCAUSAL_SELF

    def measure_differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        visible = torch.tensor([True, False])[None, :, None, None].expand(len(q), 2, q.shape[2], k.shape[2])
        return Differences(differences(*visible.shape).float(), visible, 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self.thresholds(*self.measure_differences(q, k, call)).kept


def test_a_head_that_saw_nothing_keeps_its_threshold() -> None:
    model = OneHeadHidden()
    with torch.no_grad():
        model.thresholds.offset.copy_(torch.tensor([1.0, 1.0]))
    q = k = v = torch.zeros(2, 2, 4, 8)
    found = calibrate(model, [q], 0.5, forward=lambda batch: model(batch, k, v, Call()))
    assert found[""][0] != 4.0
    assert found[""][1] == 4.0


def test_calibration_leaves_no_hooks_behind() -> None:
    model = vit()
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    calibrate(model, batches(1), 0.5)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, batches(1), 0.5, forward=lambda _: 1 / 0)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == before


def test_a_probe_reads_nothing_until_it_has_a_level_and_forgets_what_it_gave() -> None:
    model = vit()
    probe = ThresholdProbe(model)
    model(batches(1)[0])
    assert all(found.isnan().all() for found in probe.collect().values())
    probe.level = 0.5
    model(batches(1)[0])
    assert not any(found.isnan().any() for found in probe.collect().values())
    assert all(found.isnan().all() for found in probe.collect().values())


def test_a_probe_reads_as_many_examples_as_it_was_told_to() -> None:
    images = batches(1)[0]
    found = []
    for examples, batch in ((3, images), (16, images[:3])):
        model = vit()
        probe = ThresholdProbe(model, examples=examples)
        probe.level = 0.5
        model(batch)
        found.append(probe.collect())
    for name, quantile in found[0].items():
        torch.testing.assert_close(quantile, found[1][name])


@pytest.mark.parametrize("pattern", Pattern)
def test_some_queries_are_judged_as_among_all(pattern: Pattern) -> None:
    n = m = 12
    if pattern.cross:
        n = 9
    torch.manual_seed(0)
    mechanism = find("latte")(2, 4, pattern)
    q, k = torch.randn(3, 2, n, 4), torch.randn(3, 2, m, 4)
    queries, keys = torch.rand(3, n) < 0.8, torch.rand(3, m) < 0.8
    call = Call(queries=queries, keys=keys, bias=torch.randn(3, 2, n, m))
    rows = torch.tensor([0, 4, 5, 8])
    whole = mechanism.measure_differences(q, k, call)
    few, its_call = select_queries(q, m, call, pattern, rows)
    some = mechanism.measure_differences(few, k, its_call)
    visible = whole.visible.expand(3, 2, n, m)[:, :, rows]
    assert torch.equal(some.visible.expand(3, 2, 4, m), visible)
    assert torch.equal(some.difference[visible], whole.difference[:, :, rows][visible])


def test_of_long_sequences_a_probe_reads_some_queries_and_comes_near() -> None:
    torch.manual_seed(0)
    mechanism = find("latte")(2, 8, Pattern.CAUSAL_SELF)
    q, k = torch.randn(4, 2, 300, 8), torch.randn(4, 2, 300, 8)
    quantiles = []
    for pairs in (2**62, 40_000):
        probe = ThresholdProbe(mechanism, pairs=pairs)
        probe.level = 0.2
        for _ in range(8):
            mechanism(q, k, k, Call())
        quantiles.append(probe.collect()[""])
        probe.remove()
    assert not torch.equal(*quantiles)
    torch.testing.assert_close(*quantiles, rtol=0.03, atol=0)


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.5, math.nan])
def test_a_share_outside_its_range_is_refused(kept: float) -> None:
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {kept}"):
        calibrate(vit(), batches(), kept)


def test_no_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(vit(), [], 0.5)


def test_a_model_without_thresholds_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Linear has no thresholds.*sparsify"):
        calibrate(nn.Linear(2, 2), batches(), 0.5)


def test_noise_is_dropout_that_is_on() -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2)
    assert not is_noisy(model.train())
    for noise in ("proj_drop_rate", "attn_drop_rate", "drop_path_rate", "pos_drop_rate"):
        model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, **{noise: 0.1})
        assert is_noisy(model.train()), noise
        assert not is_noisy(model.eval())


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))).train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        assert not is_noisy(model)
    assert [m.training for m in model.modules()] == modes


def test_what_thresholds_keep_of_held_out_batches_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = vit(unit="nats")
    caplog.set_level("INFO", "thresher.budget.calibration")
    for held_out, level in ((batches(), "INFO"), ([0 * batch for batch in batches()], "WARNING")):
        calibrate(model, batches(), 0.2, held_out=iter(held_out))
        kept = torch.cat(list(kept_by_heads(model, held_out).values())).mean()
        assert caplog.records[-1].levelname == level
        said = re.findall(r"keep ([\d.]+) of the visible pairs", caplog.text)
        assert float(said[-1]) == pytest.approx(float(kept), abs=6e-4)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    sparsify(model, "topk_ffn", keys=0.5)  # which keeps something, too, and has no thresholds
    calibrate(model, batches(), 0.2, held_out=batches())
    assert caplog.records[-1].levelname == "INFO"
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    with pytest.raises(ValueError, match="held_out has no batch"):
        calibrate(model, batches(), 0.2, held_out=[])
