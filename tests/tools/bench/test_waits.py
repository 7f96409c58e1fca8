"""A training step never waits for the device: no mechanism, no callback and no log of it reads a value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from tests.running import CONF, tiny_config
from tests.tools.bench.waits import waits
from thresher.config.overrides import compose_config
from thresher.hosts import sparsify
from thresher.run import train as training
from thresher.tasks import base
from thresher.tools.bench.overhead import compute_loss
from thresher.tools.bench.plain import PLAIN

X = torch.tensor([1.0, 0.0, 3.0])


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: float(X.sum()),
        lambda: bool((X > 0).all()),
        lambda: X.tolist(),
        lambda: X.nonzero(),
        lambda: X[X > 0],
        lambda: X.numpy(),
        lambda: torch.equal(X, X),
        lambda: X.unique(),
        lambda: X.cpu(),
        lambda: 1.0 in X,
        lambda: torch.repeat_interleave(X, torch.tensor([1, 2, 3])),
        lambda: torch.masked_select(X, X > 0),
    ],
)
def test_what_reads_a_value_is_seen(read: Callable[[], Any]) -> None:
    with waits() as found:
        read()
    assert found
    assert __file__ in found[0]


def test_what_reads_none_is_not() -> None:
    with waits() as found:
        y = X.clone().requires_grad_()
        torch.where(X > 0, y, 0).masked_fill(X > 2, 1).softmax(-1).sum().backward()
        y.sort().values.gather(0, torch.tensor([0]))
        X.repeat_interleave(2)
        torch.nn.utils.clip_grad_norm_([y], 1.0)
    assert found == []


STEPS = ("trainer.max_epochs=1", "trainer.log_every_n_steps=4", "test=false", "task.nonfinite=null")


def steps_of(cfg: DictConfig) -> list[list[str]]:
    """Train for four steps, thresholds' gradients watched in each; return what two of them waited for."""
    seen: list[list[str]] = []
    advance = _TrainingEpochLoop.advance

    def watched(loop: Any, data_fetcher: Any) -> None:
        with waits() as found:
            advance(loop, data_fetcher)
        seen.append([wait for wait in found if "/data/" not in wait])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_TrainingEpochLoop, "advance", watched)
        patch.setattr(base, "GRADIENT_LOG_EVERY", 1)
        training.train(cfg)
    assert len(seen) == 4
    # The first step settles the budget once; the last one is written to the loggers, as every 50th is.
    return seen[1:3]


def images(folder: Path, *overrides: str) -> DictConfig:
    return tiny_config(folder, *STEPS, "callbacks.watch.moved=0", *overrides)


MECHANISMS = sorted(path.stem for path in (CONF / "attention").glob("*.yaml"))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_step_of_an_image_classifier_waits_for_nothing(name: str, tmp_path: Path) -> None:
    assert steps_of(images(tmp_path / "run", f"attention={name}")) == [[], []]


SMALL = ("model.dim=16", "model.depth=1", "model.num_heads=2", "model.ffn_dim=24", "data.batch_size=8")
SHORT = ("trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "callbacks.watch.moved=0", "run.name=test")
CORPUS = ("data=shakespeare", "data.context=32", "task=language_modeling", "model=transformer")


@pytest.mark.parametrize(
    "overrides",
    [
        ("data=austen", "data.length=40", "task=text_classification", "model=encoder"),
        (*CORPUS, "data.objective=causal"),
        (*CORPUS, "data.objective=denoising"),
    ],
    ids=["padded text", "causal", "encoder and decoder"],
)
def test_nor_does_one_on_text(overrides: tuple[str, ...], tmp_path: Path) -> None:
    given = [*overrides, *SMALL, *SHORT, *STEPS, f"run.dir='{tmp_path}/run'"]
    assert steps_of(compose_config(CONF, "train", given)) == [[], []]


@pytest.mark.parametrize(
    "overrides",
    [
        ("compute=lagrangian",),
        ("compute=penalty", "compute.quantity=macs"),
        ("attention.gate.mode=soft", "attention.gate.surrogate=sigmoid", "callbacks.temperature.end=0.5"),
        ("callbacks=ema",),
        ("callbacks.progress._target_=thresher.callbacks.progress.TerminalProgress", "+callbacks.progress.every=1000"),
    ],
    ids=lambda value: value[0],
)
def test_nor_under_any_budget_callback_or_display(overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert steps_of(images(tmp_path / "run", *overrides)) == [[], []]


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_looking_for_nan_reads_one_value_in_each_optimiser_step(
    nonfinite: str, accumulate: int, tmp_path: Path
) -> None:
    looking = (f"task.nonfinite={nonfinite}", f"trainer.accumulate_grad_batches={accumulate}")
    found = [wait for waited in steps_of(images(tmp_path / "run", *looking)) for wait in waited]
    assert all("/tasks/base.py" in wait for wait in found)
    assert len([wait for wait in found if wait.startswith("__bool__")]) == 2 // accumulate
    # As an operator the same reading is seen once more.
    assert len(found) == 2 * (2 // accumulate)


@pytest.mark.parametrize(("name", "attention"), [("timm ViT", "latte"), ("BERT", "latte"), ("GPT-2", "dense")])
def test_nor_does_a_host_where_the_plain_model_does_not(name: str, attention: str) -> None:
    plain, batch, _ = PLAIN[name]()
    with waits() as before:
        compute_loss(plain.train(), batch).backward()
    sparsify(plain, attention)
    with waits() as found:
        compute_loss(plain.train(), batch).backward()
    assert len(found) <= len(before), found
