"""Tuning on a frozen network: better than calibration at the same share, and nothing else changes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from thresher import ComputeMeter, sparsify
from thresher.attention.mechanism import dense_attention
from thresher.budget.objectives import measure_error
from thresher.budget.tuning import Tuning, tune

KEPT = 0.2


def build(**hyperparameters: Any) -> nn.Module:
    """Build a network whose heads differ: some peaked, some flat."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4, num_classes=0, pretrained=False
    )
    for block in model.blocks:
        sharp = torch.tensor([0.5, 2.0, 6.0, 14.0]).repeat_interleave(8)
        with torch.no_grad():
            block.attn.qkv.weight[:32] *= 12 * sharp[:, None]
    if hyperparameters:
        sparsify(model, **hyperparameters)
    return model


LATTE: dict[str, Any] = {"attention": "latte", "gate": {"surrogate": "inside", "tau": 0.1}}


def draw_batches(number: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 64, 64, generator=generator) for _ in range(number)]


def tune_quickly(model: nn.Module, **changes: Any) -> Tuning:
    options: dict[str, Any] = {"kept": KEPT, "steps": 30, "evaluate_every": 10, "progress": False}
    return tune(model, draw_batches(10), **(options | changes))


@pytest.mark.parametrize(("tail", "surrogate"), [("none", "sigmoid"), ("mean", "inside"), ("mean", "sigmoid")])
@pytest.mark.parametrize(("unit", "tau", "lr"), [("spread", 0.1, 0.03), ("nats", 0.35, 0.02)])
def test_tuned_thresholds_err_less_than_calibrated_ones_at_the_same_share(
    unit: str, tau: float, lr: float, tail: str, surrogate: str
) -> None:
    model = build(attention="latte", unit=unit, tail=tail, gate={"surrogate": surrogate, "tau": tau})
    found = tune_quickly(model, lr=lr)
    assert found.tuned.error <= found.calibrated.error
    assert found.tuned.error < 0.97 * min(found.starts["share"].error, found.starts["value"].error)
    for each in (found.calibrated, found.tuned):
        assert each.kept == pytest.approx(KEPT, rel=0.02)
    meter = ComputeMeter(model)
    with meter, torch.no_grad():
        for batch in draw_batches(10)[-2:]:
            model.eval()(batch)
    spent, visible = (sum(float(getattr(cost, part).sum()) for cost in meter.costs()) for part in ("kept", "visible"))
    assert spent / visible == pytest.approx(KEPT, rel=0.1), "the thresholds that it reports are those of the model"
    assert bool(found.factors) == (tail == "mean")
    assert len(found.history) == 30


@pytest.mark.parametrize("tail", ["none", "mean"])
def test_numbers_of_keys_of_heads_are_tuned_likewise(tail: str) -> None:
    model = build(attention="topk", keys=0.3, per_head=True, tail=tail)
    found = tune_quickly(model)
    assert set(found.starts) == {"share", "greedy"}
    assert found.tuned.error <= found.calibrated.error
    assert found.tuned.error < 0.97 * found.starts["share"].error
    coarse = 1 / 17  # one key of each row
    assert found.calibrated.kept == pytest.approx(KEPT, abs=coarse / 2)
    assert found.tuned.kept == pytest.approx(KEPT, abs=coarse / 4)
    factors = torch.stack(list(found.thresholds.values()))
    assert factors.max() > 1.1 * factors.min()


def test_nothing_else_of_the_network_changes() -> None:
    model = build(**LATTE, tail="mean").train()
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    tune_quickly(model, steps=3)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all(".thresholds." in name or name.endswith(".tail.factor") for name in changed)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for name, p in model.named_parameters() if "mechanism" not in name)
    assert model.training
    assert model.blocks[1].attn.mechanism.training


def test_the_same_batches_give_the_same_thresholds() -> None:
    one, other = (tune_quickly(build(**LATTE, tail="mean"), steps=6) for _ in range(2))
    assert one.history == other.history
    for name, values in one.thresholds.items():
        assert torch.equal(values, other.thresholds[name])


def test_the_better_start_is_taken() -> None:
    found = tune_quickly(build(**LATTE, tail="mean"), steps=1)
    assert set(found.starts) == {"share", "value", "greedy"}
    errors = {name: measured.error for name, measured in found.starts.items()}
    assert errors["share"] != errors["value"]
    assert found.calibrated.error == min(errors.values())
    assert all(measured.kept == pytest.approx(KEPT, rel=0.02) for measured in found.starts.values())


def test_an_interrupted_tuning_continues_and_ends_where_it_would_have_ended(tmp_path: Path) -> None:
    file = tmp_path / "tuning.pt"
    options = {"steps": 9, "evaluate_every": 3}
    whole = tune_quickly(build(**LATTE, tail="mean"), **options)
    model = build(**LATTE, tail="mean")
    calls = itertools.count()

    def interrupted(batch: Tensor) -> Any:
        if torch.is_grad_enabled() and next(calls) == 7:
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        tune_quickly(model, **options, state_file=file, forward=interrupted)
    for _ in range(2):  # the second time nothing is left to do
        model = build(**LATTE, tail="mean")
        found = tune_quickly(model, **options, state_file=file)
        assert (found.history, found.tuned, found.starts) == (whole.history, whole.tuned, whole.starts)
        for name, values in whole.thresholds.items():
            assert torch.equal(found.thresholds[name], values)
            assert torch.equal(found.factors[name], whole.factors[name])
    with pytest.raises(ValueError, match=r"tuning\.pt is of a tuning with another steps; choose another state_file"):
        tune_quickly(model, **options | {"steps": 10}, state_file=file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"tuning\.pt is damaged"):
        tune_quickly(model, **options, state_file=file)


@pytest.mark.parametrize("attention", ["latte", "topk", "smyrf", "yoso", "mean"])
def test_the_teacher_is_the_network_before_it_was_sparse(attention: str) -> None:
    (batch,) = draw_batches(1)
    plain, model = build().eval(), build(attention=attention).eval()
    with torch.no_grad():
        sparse = model(batch)
        with dense_attention():
            dense = model(batch)
        again = model(batch)
    torch.testing.assert_close(dense, plain(batch), atol=1e-5, rtol=1e-5)
    assert torch.equal(sparse, again), "the dense mode ends with its block"
    assert not torch.equal(sparse, dense) or attention == "smyrf"


def test_hidden_tokens_do_not_count_in_the_error() -> None:
    wanted = torch.randn(2, 5, 3)
    found = wanted + 0.1
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spoiled = found.clone()
    spoiled[0, 3:] = 100
    one, other = (measure_error(x, wanted, {"attention_mask": mask}, "error") for x in (found, spoiled))
    assert torch.equal(one, other)
    assert measure_error(spoiled, wanted, {}, "error") > one


def test_logits_are_compared_by_their_divergence() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    wanted, found = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    torch.testing.assert_close(
        measure_error(Output(found), Output(wanted), {}, "auto"), (p.exp() * (p - q)).sum(-1).mean()
    )
    assert measure_error(Output(wanted), Output(wanted), {}, "auto") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 0.0}, "must lie between 0 and 1, got 0"),
        ({"kept": 1.0}, "must lie between 0 and 1, got 1"),
        ({"kept": 0.001}, "kept=0.001 is out of reach: thresholds keep between"),
        ({"batches": []}, "at least one batch to tune on"),
        ({"batches": draw_batches(1)}, "at least one batch to tune on"),
        ({"batches": [torch.full((2, 3, 64, 64), float("nan"))] * 3}, "output is not finite"),
        ({"forward": lambda batch: None}, "no tensor to compare"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_one_sentence(change: dict[str, Any], message: str) -> None:
    model = build(**LATTE)
    inputs = {"batches": draw_batches(4), "kept": KEPT, "steps": 2, "progress": False} | change
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        tune(model, inputs.pop("batches"), inputs.pop("kept"), **inputs)
    assert all(p.requires_grad for name, p in model.named_parameters() if "pos_embed" not in name)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "nothing is lost"


@pytest.mark.parametrize("changes", [{"attention": "topk"}, {"attention": "latte", "trainable": False}], ids=str)
def test_a_model_without_trainable_thresholds_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no trainable thresholds to tune"):
        tune_quickly(build(**changes))


def test_an_unknown_start_is_refused_and_others_can_be_left_out() -> None:
    found = tune_quickly(build(**LATTE), steps=0, starts=("value",))
    assert set(found.starts) == {"value"}
    assert found.headroom is None
    assert found.tuned == found.starts["value"]
    with pytest.raises(ValueError, match="starts must be one of share, value, greedy; got 'shares'"):
        tune_quickly(build(**LATTE), starts=("shares",))


def test_a_network_in_bf16_is_tuned() -> None:
    model = build().bfloat16()
    sparsify(model, **LATTE, tail="mean")
    found = tune(
        model,
        [x.bfloat16() for x in draw_batches(8)],
        KEPT,
        steps=10,
        evaluate_every=5,
        starts=("share",),
        progress=False,
    )
    assert model.patch_embed.proj.weight.dtype is torch.bfloat16
    assert all(values.dtype is torch.float32 for values in found.thresholds.values())
    assert found.tuned.error < found.calibrated.error
    assert found.tuned.kept == pytest.approx(KEPT, rel=0.02)


class Attending(nn.Module):
    """Attention of somebody's own, by F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("host", ["MultiheadAttention", "SDPA"])
def test_any_host_is_tuned(host: str) -> None:
    torch.manual_seed(0)
    if host == "SDPA":
        model: nn.Module = nn.Sequential(nn.Linear(32, 32), Attending())
        sharp = model[1].qkv.weight
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, 0.0, batch_first=True), 1)
        sharp = model.layers[0].self_attn.in_proj_weight
    with torch.no_grad():
        sharp[:32] *= 4 * torch.tensor([0.5, 2.0, 6.0, 14.0]).repeat_interleave(8)[:, None]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 24, 32, generator=generator) for _ in range(8)]
    sparsify(model, **LATTE, tail="mean", example_inputs=batches[0] if host == "SDPA" else None)
    found = tune(model, batches, KEPT, steps=20, evaluate_every=10, progress=False)
    assert found.tuned.error <= found.calibrated.error
    assert found.tuned.error < 0.97 * found.starts["share"].error


def test_frozen_thresholds_stay_as_they_are() -> None:
    model = build(**LATTE)
    frozen = model.blocks[0].attn.mechanism.thresholds
    frozen.offset.requires_grad_(False)
    before = {name: x.clone() for name, x in frozen.state_dict().items()}
    found = tune_quickly(model, kept=0.6, steps=2)
    assert all(torch.equal(x, before[name]) for name, x in frozen.state_dict().items())
    assert list(found.thresholds) == ["blocks.1.attn.mechanism"]
    assert found.tuned.kept == pytest.approx(0.6, rel=0.02)


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    model = build(**LATTE)
    tune_quickly(model, steps=1, state_file=tmp_path / "tuning.pt")
    other = build(**LATTE)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight *= 1.1
    with pytest.raises(ValueError, match="of a tuning with another weights"):
        tune_quickly(other, steps=1, state_file=tmp_path / "tuning.pt")


def test_a_tuning_that_continues_reports_the_steps_before(tmp_path: Path) -> None:
    steps: list[int] = []
    for _ in range(2):
        tune_quickly(
            build(**LATTE),
            steps=3,
            state_file=tmp_path / "tuning.pt",
            on_step=lambda step, measured: steps.append(step),
        )
    assert steps == [1, 2, 3, 1, 2, 3]


def test_an_error_that_is_only_rounding_does_not_stop_the_thresholds() -> None:
    torch.manual_seed(0)
    model = build(**LATTE, tail="mean")
    head = nn.Linear(32, 5)
    found = tune(
        model,
        draw_batches(6),
        0.97,
        forward=lambda x: head(model(x) * 1e-3),
        objective="kl",
        steps=6,
        evaluate_every=3,
        progress=False,
    )
    assert all(measured.error >= 0 for measured in (found.tuned, *found.history, *found.starts.values()))
    offsets = torch.cat(list(found.thresholds.values()))
    assert offsets.isfinite().all()
