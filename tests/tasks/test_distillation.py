"""Distillation in joint training: the term is what it says, and everything else is as it would be without it."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.run.test_language import OURS, TEXT, TRAINER
from tests.running import CONF, run_eval, tiny_config
from thresher.attention.mechanism import attends_densely, dense_attention
from thresher.budget.calibration import evaluation_mode
from thresher.checkpoints.load import load_checkpoint
from thresher.config.overrides import compose_config
from thresher.run import train as training
from thresher.run.build import build_data, build_task
from thresher.tasks.base import Task
from thresher.tasks.distillation import measure_divergence, predict_densely

SHORT = ("trainer.max_epochs=1", "test=false", "callbacks.watch.moved=0")
SPARSE = ("attention.tail=mean", "compute=target", "compute.target=0.2", "compute.start=0", "compute.end=0")


def read_rows(folder: Path, name: str = "train/distill") -> list[float]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def read_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return {name: x for name, x in state.items() if name.startswith("net.")}


def train(folder: Path, *overrides: str) -> dict[str, float]:
    return training.train(tiny_config(folder, *SHORT, *SPARSE, *overrides))


def test_the_divergence_is_that_of_the_softmax_over_what_counts() -> None:
    found, wanted = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    p, q = wanted.softmax(-1), found.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert_close(measure_divergence(found, wanted), each.mean())
    counted = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    assert_close(measure_divergence(found, wanted, counted), each[counted].mean())
    measure_divergence(found, wanted, counted).backward()
    assert found.grad is not None
    assert (found.grad[~counted] == 0).all()
    assert_close(found.grad[counted], ((q - p) / counted.sum())[counted].detach())


def build(*overrides: str) -> tuple[Task, Any]:
    config = tiny_config(Path("nowhere"), *overrides)
    data = build_data(config)
    data.setup("fit")
    torch.manual_seed(0)
    task = build_task(config, data)
    with torch.no_grad():
        for parameter in task.net.parameters():  # heads begin at zero
            parameter += 0.2 * torch.randn_like(parameter)
    return task, next(iter(data.train_dataloader()))


def test_the_teacher_is_the_network_under_dense_attention_without_dropout() -> None:
    task, batch = build("attention.threshold=0.2", "+model.pos_drop_rate=0.5")
    task.net.train()
    state = torch.get_rng_state()
    found = predict_densely(task.net, lambda x: task.step(x).predictions, batch)
    assert torch.equal(torch.get_rng_state(), state), "it draws nothing"
    assert not found.requires_grad
    assert task.net.training
    assert not attends_densely()
    with dense_attention(), evaluation_mode(task.net), torch.no_grad():
        assert torch.equal(found, task.net(batch[0]))
    assert not torch.equal(found, task.net.eval()(batch[0]))


def test_weights_learn_in_bf16_though_they_were_cast_without_gradient_before() -> None:
    net = nn.Linear(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        predict_densely(net, net, torch.ones(4, 3))
        net(torch.ones(4, 3)).sum().backward()
    assert net.weight.grad is not None
    assert (net.weight.grad == 4).all()


def test_the_loss_is_the_one_without_it_and_the_weighted_divergence(tmp_path: Path) -> None:
    """With a weight of nearly nothing the term is measured, and the training is that without it."""
    plain, measured = (train(tmp_path / name, f"task.distill={w}") for name, w in (("plain", 0), ("measured", 1e-12)))
    assert "train/distill" not in plain
    assert 0 < measured["train/distill"] < 5
    assert plain["train/loss"] == pytest.approx(measured["train/loss"], rel=1e-5)
    one, other = (read_state(tmp_path / name) for name in ("plain", "measured"))
    for name, value in one.items():
        assert_close(value, other[name], atol=1e-5, rtol=1e-4)
    train(tmp_path / "pulled", "task.distill=3")
    assert not all(torch.equal(x, read_state(tmp_path / "pulled")[name]) for name, x in one.items())


def test_nothing_is_computed_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.tasks.base.predict_densely", None)
    train(tmp_path / "run", "task.distill=0")


def test_sparse_outputs_come_nearer_to_dense_ones() -> None:
    task, batch = build("attention.threshold=0.2")
    optimizer = torch.optim.Adam(task.net.parameters(), lr=3e-3)
    task.net.train()
    divergences = []
    for _ in range(20):
        dense = predict_densely(task.net, task.net, batch[0])
        divergence = measure_divergence(task.step(batch).predictions, dense)
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
        divergences.append(float(divergence.detach()))
    assert divergences[-1] < 0.5 * divergences[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2", "callbacks=ema"),
        ("+model.pos_drop_rate=0.3", "compute.start=0.1", "compute.end=0.6"),
        ("attention=smyrf", "attention.cluster=16", "compute=free"),
        ("attention=topk", "attention.keys=0.2", "compute=free"),
    ],
    ids=" ".join,
)
def test_it_goes_with_other_settings(overrides: tuple[str, ...], tmp_path: Path) -> None:
    given = SPARSE[:1] if overrides[0].startswith("attention") else SPARSE
    own = [each for each in given if not (each.startswith("attention.") and "smyrf" in overrides[0])]
    metrics = training.train(tiny_config(tmp_path / "run", *SHORT, *own, *overrides, "task.distill=1"))
    assert math.isfinite(metrics["train/distill"])
    assert metrics["train/distill"] >= 0
    assert read_rows(tmp_path / "run")


def test_calibration_does_not_read_the_dense_forward(tmp_path: Path) -> None:
    frozen = ("optimizer.lr=0", "optimizer.threshold_lr=0", "optimizer.weight_decay=0", "+model.pos_drop_rate=0.5")
    for weight in (0, 1):
        train(tmp_path / f"{weight}", *frozen, f"task.distill={weight}")
    one, other = (read_state(tmp_path / f"{weight}") for weight in (0, 1))
    names = [name for name in one if name.endswith("base")]
    assert names
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize("objective", ["causal", "masked", "denoising"])
def test_language_models_learn_from_what_counts(objective: str, tmp_path: Path) -> None:
    overrides = [
        *TRAINER,
        *OURS,
        f"data.objective={objective}",
        "task.distill=1",
        SHORT[2],
        f"run.dir='{tmp_path}/run'",
    ]
    metrics = training.train(compose_config(CONF, "train", [*overrides, *SPARSE]))
    assert metrics["train/distill"] > 0


def test_text_classifiers_learn_too_and_are_evaluated_with_any_attention(tmp_path: Path) -> None:
    overrides = [*TRAINER, *TEXT, "task.class_weights=balanced", "task.distill=1", *SPARSE, SHORT[2]]
    metrics = training.train(compose_config(CONF, "train", [*overrides, f"run.dir='{tmp_path}/run'"]))
    assert metrics["train/distill"] > 0
    ckpt = f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'"
    assert run_eval([ckpt, "attention=dense", f"run.dir='{tmp_path}/dense'"], CONF)["test/kept"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=dense", "compute=free", "task.distill=1"], "task.distill has no effect with attention=dense"),
        (["task=tuning", "+task.distill=1"], "task.distill has no effect with task=tuning"),
        (["task.distill=-1"], "task.distill must be a finite number, at least 0"),
        (["task.distill=.nan"], "task.distill must be a finite number, at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_effect_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        training.train(tiny_config(tmp_path / "run", *SHORT, *overrides))


def test_gradient_checkpointing_recomputes_the_sparse_forward() -> None:
    task, batch = build("attention.threshold=0.2", "attention.gate.surrogate=compact")
    gradients = []
    for checkpointing in (False, True):
        task.net.set_grad_checkpointing(checkpointing)
        task.net.train()
        dense = predict_densely(task.net, lambda x: task.step(x).predictions, batch)
        task.zero_grad()
        measure_divergence(task.step(batch).predictions, dense).backward()
        gradients.append({name: p.grad.clone() for name, p in task.net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name])
    assert gradients[0]["blocks.0.attn.qkv.weight"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from the compiler itself
def test_a_compiled_network_has_the_same_teacher(tmp_path: Path) -> None:
    torch.compiler.reset()
    for compiled in ("false", "true"):
        train(tmp_path / compiled, "task.distill=1", f"compile={compiled}", "trainer.limit_train_batches=3")
    eager, found = (read_rows(tmp_path / compiled) for compiled in ("false", "true"))
    assert len(eager) == 3
    assert found == pytest.approx(eager, rel=1e-3, abs=1e-6)
