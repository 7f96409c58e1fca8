"""Whole training steps: the same network twice, sparse and as a user would have it without this toolkit."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from tests.tools.bench.small import job, scene
from thresher.attention import Mechanism
from thresher.attention.mechanism import Metered
from thresher.budget.meter import ComputeMeter
from thresher.tools.bench import memory
from thresher.tools.bench.jobs import Job
from thresher.tools.bench.steps import Fused, Step, build_networks, calibrate_in_order, draw_batch, measure_step

GPT = {"depth": 2, "batch": 2}
VIT = {"name": "vit_tiny_patch16_224", "batch": 1}


def row(name: str, model: str, n: int, kept: float | None = None) -> Job:
    pattern = "causal_self" if model == "gpt" else "noncausal_self"
    return replace(job(name, n, pattern, kept), model=model, sizes=GPT if model == "gpt" else VIT)


def attention_of(net: nn.Module) -> set[str]:
    return {type(module).__name__ for module in net.modules() if isinstance(module, Metered)}


@pytest.mark.parametrize(("model", "n"), [("gpt", 24), ("vit", 17)])
def test_both_networks_are_the_same_but_for_attention(model: str, n: int) -> None:
    plain, sparse = build_networks(row("topk", model, n), scene())
    assert attention_of(sparse) == {"TopK"}
    assert attention_of(plain) == ({Fused.__name__} if model == "gpt" else set())  # timm's own, as timm made it
    weights = dict(sparse.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in plain.named_parameters())
    plain, equal = build_networks(replace(row("topk", model, n), hyperparameters={"keys": 1.0}), scene())
    x, _ = draw_batch(row("topk", model, n), scene())
    assert torch.allclose(plain.eval()(x), equal.eval()(x), atol=1e-5)


def test_a_step_trains_every_parameter() -> None:
    own = replace(row("latte", "gpt", 24, 0.5), hyperparameters={"threshold": 0.5})
    _, sparse = build_networks(own, scene())
    meter = ComputeMeter(sparse)
    batch = draw_batch(own, scene())
    step = Step(sparse.train(), meter, own.kept, scene())
    step.loss(*batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sparse.parameters())
    before = [p.detach().clone() for p in sparse.parameters()]
    assert all(seconds > 0 for seconds in step(batch))
    assert all(not torch.equal(a, b) for a, b in zip(before, sparse.parameters(), strict=True))


def test_deep_layers_are_calibrated_behind_sparse_ones() -> None:
    own = row("latte", "gpt", 48, 0.2)
    _, sparse = build_networks(own, scene())
    batch, _ = draw_batch(own, scene())
    mechanisms = [m for m in sparse.modules() if isinstance(m, Mechanism)]
    meter = ComputeMeter(sparse)
    with torch.no_grad():
        calibrate_in_order(mechanisms, partial(sparse.eval(), batch), 0.2)
        with meter:
            sparse(batch)
    for cost in meter.costs():
        assert float(cost.kept.sum() / cost.visible.sum()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("name", "model", "n", "kept"), [("latte", "gpt", 32, 0.2), ("topk", "vit", 17, None)])
def test_a_row_holds_a_step_and_its_parts(name: str, model: str, n: int, kept: float | None) -> None:
    found = measure_step(row(name, model, n, kept), scene())
    assert found["speedup_step"] == pytest.approx(found["dense_step_ms"] / found["step_ms"])
    assert found["step_ms"] >= found["train_fwd_ms"]
    assert found["batch"] == (GPT if model == "gpt" else VIT)["batch"]
    assert found["heads"] == (2 if model == "gpt" else 3)
    if kept is not None:
        assert found["kept"] == pytest.approx(kept, abs=0.05)
    assert found.get("peak_mb", 1) > 0 or not memory.can_reset("cpu")


def test_a_vit_has_a_square_of_patches() -> None:
    with pytest.raises(ValueError, match="197, 785"):
        build_networks(row("topk", "vit", 200), scene())
