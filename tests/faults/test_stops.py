"""A training that is asked to stop, and one whose numbers are not finite: what it leaves, and what it says."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints.test_resume import assert_same
from tests.faults.processes import begin, finish, until
from tests.running import tiny_config
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training
from thresher.signals import Interrupted, Signals
from thresher.tasks.finite import NonFiniteError

QUIET = ("callbacks.watch.moved=0", "test=false", "callbacks.last_checkpoint.every_n_steps=1")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_snapshot_and_its_exit_code(signum: signal.Signals, code: int, tmp_path: Path) -> None:
    rare = "callbacks.last_checkpoint.every_n_steps=1000"
    process = begin(tmp_path / "run", rare, "trainer.max_epochs=200")
    until(tmp_path / "run" / "checkpoints" / "last.ckpt", process)  # the first epoch is over
    process.send_signal(signum)
    got, output = finish(process)
    assert got == code, output
    folder = rf"\S*{tmp_path.name}/run"
    assert re.search(rf"run folder: {folder}\n", output), output
    assert re.search(rf"stopped by {signum.name}; the same command with run\.dir={folder} resumes", output), output
    assert "Traceback" not in output
    stopped = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert stopped["position"]["batch"] or stopped["global_step"] >= 12
    epochs = stopped["epoch"] + 2
    code, output = finish(begin(tmp_path / "run", rare, f"trainer.max_epochs={epochs}"))
    assert code == 0, output
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 12 * epochs


class Raise:
    """Sends a signal to this process after so many training steps."""

    def __init__(self, step: Any, after: int) -> None:
        self.step, self.left = step, after

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.step(*args)


def test_a_run_that_a_signal_stopped_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.tasks.classification import Classification

    quiet = ("callbacks.watch.moved=0", "callbacks.last_checkpoint.every_n_minutes=null")
    training.train(tiny_config(tmp_path / "whole", *quiet))
    raising = Raise(Classification.training_step, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", lambda *args: raising(*args))
        with pytest.raises(Interrupted) as interruption:
            training.train(tiny_config(tmp_path / "stopped", *quiet))
    assert interruption.value.code == 143
    assert load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.ckpt")["position"]["batch"] == 3
    training.train(tiny_config(tmp_path / "stopped", *quiet))
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_slurm_has_one_owner_of_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1


class Spoil(nn.Module):
    """A layer that yields `value` in one of its calls in training, or gives it to the gradient.

    Args:
        inner: The layer.
        at: The call, counted from 0.
        value: NaN or infinity.
        backward: Whether it is the gradient that is spoilt.
    """

    def __init__(self, inner: nn.Module, at: int, value: float, *, backward: bool) -> None:
        super().__init__()
        self.inner, self.at, self.value, self.backward_only = inner, at, value, backward
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if not self.training:
            return out
        self.calls += torch.is_grad_enabled()  # a repetition that looks for the layer meets the same
        if self.calls == self.at + 1:
            if not self.backward_only:
                return out * self.value
            out.register_hook(lambda gradient: gradient * self.value)
        return out


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that spoils one layer of the next network."""
    build = training.build_task

    def spoil(at: int, value: float, *, backward: bool = False) -> None:
        def built(*args: Any) -> Any:
            task = build(*args)
            task.net.blocks[1].mlp.fc1 = Spoil(task.net.blocks[1].mlp.fc1, at, value, backward=backward)
            return task

        monkeypatch.setattr(training, "build_task", built)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step_and_names_layer_and_batch(
    value: float, spoilt: Any, tmp_path: Path
) -> None:
    spoilt(5, value)
    where = r"step 5: the loss is nan in batch 1 of epoch 1, first in the output of blocks\.1\.mlp\.fc1\."
    with pytest.raises(NonFiniteError, match=where):
        training.train(tiny_config(tmp_path / "run", *QUIET))
    snapshot = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert snapshot["global_step"] == 5
    assert all(bool(v.isfinite().all()) for v in snapshot["state_dict"].values() if v.is_floating_point())


def test_a_gradient_that_is_not_finite_stops_the_step_too(spoilt: Any, tmp_path: Path) -> None:
    spoilt(2, float("inf"), backward=True)
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient of \S+ and \d+ more is not finite after batch 2"):
        training.train(tiny_config(tmp_path / "run", *QUIET))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_such_steps_can_be_left_out(backward: bool, accumulate: int, spoilt: Any, tmp_path: Path) -> None:
    spoilt(2, float("nan"), backward=backward)
    overrides = ("task.nonfinite=skip", "compute=lagrangian", "compute.start=0", "compute.end=0.5")
    with pytest.warns(UserWarning, match="the step is skipped"):
        metrics = training.train(
            tiny_config(tmp_path / "run", *QUIET, *overrides, f"trainer.accumulate_grad_batches={accumulate}")
        )
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(bool(v.isfinite().all()) for v in state["state_dict"].values() if v.is_floating_point())
    assert state["global_step"] == 8 // accumulate
    assert metrics["val/loss"] < 3


def test_a_batch_that_is_not_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.data.examples import StoredImages

    read = StoredImages.load
    monkeypatch.setattr(StoredImages, "load", lambda self, indices: read(self, indices).float() / 0 - 1 / 1e-50)
    with pytest.raises(NonFiniteError, match=r"batch 0 of epoch 0, .*; the batch itself holds values that are not"):
        training.train(tiny_config(tmp_path / "run", *QUIET))


def test_what_to_do_with_such_steps_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"task\.nonfinite must be one of stop, skip, null, got 'ignore'"):
        training.train(tiny_config(tmp_path / "run", "task.nonfinite=ignore"))
