"""Trainings that begin with the thresholds and tail factors of a tuning, and train weights under the same budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tests.checkpoints.test_resume import assert_same
from tests.checkpoints.test_resume import run as run_and_stop
from tests.run.test_tune import SHORT
from tests.running import tiny_config
from thresher.callbacks.thresholds import CalibrateThresholds
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training

LIKE_TUNED = ("attention.tail=mean", "compute=target", "compute.target=0.3", "init_mechanisms=true")
AT_ONCE = ("compute.start=0", "compute.end=0", "trainer.max_epochs=1")
ANNEALED = ("compute.start=0.1", "compute.end=0.5", "trainer.max_epochs=4")
FROZEN = ("optimizer.lr=0", "optimizer.threshold_lr=0", "optimizer.weight_decay=0", "callbacks.watch.moved=0")
MOVED = torch.tensor([0.4, -0.3])  # of the heads of each layer, in spreads


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    training.train(tiny_config(folder, "attention=dense", "compute=free", "trainer.max_epochs=1"))
    return folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def tuned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tuning whose heads differ much."""
    folder = tmp_path_factory.mktemp("tuned")
    training.train(tiny_config(folder, *SHORT, "task.steps=0", "task.starts=[share]", f"init_from='{dense}'"))
    stored = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    for name, value in stored["state_dict"].items():
        if name.endswith("thresholds.offset"):
            value += MOVED
        elif name.endswith("tail.factor"):
            value.fill_(0.7)
    torch.save(stored, folder / "moved.ckpt")
    return folder / "moved.ckpt"


def read(path: Path, name: str) -> Tensor:
    state = load_checkpoint(path)["state_dict"]
    return torch.stack([value for key, value in state.items() if key.endswith(name)])


def read_thresholds(path: Path) -> Tensor:
    return read(path, "thresholds.eval_base") + read(path, "thresholds.offset")


def train(folder: Path, path: Path | None, *overrides: str) -> dict[str, float]:
    start = [] if path is None else [f"init_from='{path}'"]
    return training.train(tiny_config(folder, *start, *LIKE_TUNED, *overrides))


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The thresholds of training and of evaluation at the first step."""
    seen: list[tuple[Tensor, Tensor]] = []
    begin: Any = CalibrateThresholds.on_train_batch_start

    def note(self: CalibrateThresholds, trainer: Any, task: Any, *batch: Any) -> None:
        if not seen:
            every = [each for name, each in task.net.named_modules() if name.endswith(".thresholds")]
            seen.append(
                (
                    torch.stack([each.base + each.offset for each in every]).detach().clone(),
                    torch.stack([each.eval_base + each.offset for each in every]).detach().clone(),
                )
            )
        begin(self, trainer, task, *batch)

    monkeypatch.setattr(CalibrateThresholds, "on_train_batch_start", note)
    return seen


@pytest.mark.parametrize("schedule", [AT_ONCE, ANNEALED], ids=["at once", "annealed"])
def test_tuned_thresholds_stay_at_first_and_keep_what_sets_heads_apart(
    schedule: tuple[str, ...], tuned: Path, first: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    given = read_thresholds(tuned)
    assert (given[:, 0] - given[:, 1]).min() > 0.4
    metrics = train(tmp_path / "run", tuned, *schedule, *FROZEN, "attention.gate.tau=0.4", "data.augment=none")
    ((in_training, in_evaluation),) = first
    assert_close(in_evaluation, given, atol=1e-5, rtol=0)
    assert torch.equal(in_training, in_evaluation), "nothing is dropped"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    moved = read_thresholds(last) - given
    assert (moved - moved.mean(1, keepdim=True)).abs().max() < 0.1, "heads move alike"
    assert metrics["val/kept"] == pytest.approx(0.3, abs=0.06)
    assert (read(last, "tail.factor") == torch.tensor(0.7)).all()
    assert_close(read(last, "thresholds.tau"), torch.full((2,), 0.4))


def test_without_it_thresholds_are_calibrated_anew(tuned: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tuned, *AT_ONCE, *FROZEN, "init_mechanisms=false", "data.augment=none")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    moved = read_thresholds(last) - read_thresholds(tuned)
    assert (moved - moved.mean(1, keepdim=True)).abs().max() > 0.2
    assert (read(last, "tail.factor") == 1).all()


def test_with_dropout_they_stay_in_evaluation(tuned: Path, first: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    train(tmp_path / "run", tuned, *AT_ONCE, "+model.pos_drop_rate=0.5", "test=false")
    ((in_training, in_evaluation),) = first
    assert_close(in_evaluation, read_thresholds(tuned), atol=1e-5, rtol=0)
    assert not torch.equal(in_training, in_evaluation)


def test_without_a_target_they_are_what_training_begins_with(tuned: Path, tmp_path: Path) -> None:
    path = f"init_from='{tuned}'"
    overrides = ("attention.tail=mean", "compute=free", "init_mechanisms=true", *FROZEN, "trainer.max_epochs=1")
    training.train(tiny_config(tmp_path / "run", path, *overrides))
    assert torch.equal(read_thresholds(tmp_path / "run" / "checkpoints" / "last.ckpt"), read_thresholds(tuned))


def test_weights_and_thresholds_train_on(tuned: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tuned, *AT_ONCE, "optimizer.threshold_lr=0.01")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for name in ("qkv.weight", "tail.factor"):
        assert not torch.equal(read(last, name), read(tuned, name))


def test_one_that_was_stopped_resumes_to_the_same_end(tuned: Path, tmp_path: Path) -> None:
    overrides = (f"init_from='{tuned}'", *LIKE_TUNED, "compute.start=0", "compute.end=0")
    run_and_stop(tmp_path / "whole", *overrides)
    with pytest.raises(Exception, match=r"^$"):
        run_and_stop(tmp_path / "stopped", *overrides, stop=3)
    run_and_stop(tmp_path / "stopped", *overrides)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=null"], "takes thresholds from init_from: name a checkpoint there, too"),
        (["init_mechanisms=1"], "init_mechanisms must be true or false"),
        (
            ["attention=topk", "attention.per_head=true"],
            r"\(attention=latte\) are not those of this run \(attention=topk",
        ),
        (["attention.tail=none"], r"left over .*tail\.factor"),
        (["model.num_heads=4"], r"of another shape .*thresholds\.\w+"),
        (["attention.unit=nats"], "count in spread, and this run's in nats: set attention.unit=spread"),
        (
            ["callbacks.calibrate.initial=0.5"],
            "sets thresholds anew, and init_mechanisms=true takes those of init_from",
        ),
        (["task=tuning", "compute=target"], "task=tuning calibrates thresholds anew"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        train(tmp_path / "run", tuned, *overrides)


def test_what_holds_no_mechanisms_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention=dense of .* has no thresholds, tail factors or other state"):
        train(tmp_path / "dense", dense)
    state = load_checkpoint(dense)["state_dict"]
    save_file({name.removeprefix("net."): x for name, x in state.items()}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is a file of weights alone"):
        train(tmp_path / "weights", tmp_path / "weights.safetensors")
