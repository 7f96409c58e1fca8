"""A run that was stopped anywhere ends as one that was never interrupted: weights, log and metrics."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.running import tiny_config
from thresher.callbacks.snapshots import Snapshots
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training

SMALL = ("data.limit_train=64", "data.batch_size=8", "trainer.max_epochs=2", "callbacks.watch.moved=0")
EVERY_STEP = "callbacks.last_checkpoint.every_n_steps=1"


class Stop(Exception):
    """Ends a training as a kill would: nothing is written any more."""


class StopAt(pl.Callback):
    """Raise before the batch that comes after so many others."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop


def run(folder: Path, *overrides: str, stop: int | None = None) -> dict[str, float]:
    """Train; where it is to stop, stop it after so many batches."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            made = pl.Trainer.__init__

            def with_stop(self: pl.Trainer, *args: Any, callbacks: list[pl.Callback], **kwargs: Any) -> None:
                made(self, *args, callbacks=[*callbacks, StopAt(stop)], **kwargs)

            patch.setattr(pl.Trainer, "__init__", with_stop)
        return training.train(tiny_config(folder, *SMALL, EVERY_STEP, *overrides))


def result(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the weights, the log and the metrics of a run."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["train/seconds"]
    return (
        load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"],
        (folder / "csv" / "version_0" / "metrics.csv").read_text(),
        metrics,
    )


def assert_same(a: Path, b: Path) -> None:
    (weights, log, metrics), (others, other_log, other_metrics) = result(a), result(b)
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]
    assert log.splitlines() == other_log.splitlines()
    assert metrics == other_metrics
    assert (a / "heads.json").read_text() == (b / "heads.json").read_text()


CASES = {
    "latte": ("attention=latte", "compute=lagrangian", "compute.quantity=macs", "compute.target=0.6"),
    "temperature": ("attention=latte", "callbacks.temperature.end=0.3", "trainer.val_check_interval=0.25"),
    "dropout": (
        *("attention=dense", "+model.proj_drop_rate=0.2", "+model.attn_drop_rate=0.1", "callbacks=ema"),
        "trainer.limit_train_batches=7",
    ),
    "mca": ("attention=mca", "data.augment=randaugment", "data.erase=0.5"),
    "yoso": ("attention=yoso", "trainer.accumulate_grad_batches=2"),
    "smyrf": ("attention=smyrf", "attention.cluster=16", "data.augment=crop_flip", "data.workers=2"),
    "topk": ("attention=topk", "trainer.accumulate_grad_batches=3", "data.workers=2"),
    "mean": ("attention=mean",),
    "none": ("attention=none", "data.batch_size=1", "data.limit_train=9", "data.augment=crop_flip"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, *CASES[case])
    for stop in (3, 4, 4):  # mid-epoch, near the end of the first epoch, and in the second
        with pytest.raises(Stop):
            run(stopped, *CASES[case], stop=stop)
    run(stopped, *CASES[case])
    assert_same(whole, stopped)


def test_a_run_that_was_stopped_before_its_first_snapshot_begins_anew(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop=0)
    run(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_finished_run_is_tested_again_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    run(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "before")


def test_a_damaged_snapshot_is_told_and_the_one_before_is_taken(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole)
    with pytest.raises(Stop):
        run(stopped, stop=6)
    newest = stopped / "checkpoints" / "last.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read: .* Resuming from the snapshot before it"):
        run(stopped)
    assert_same(whole, stopped)
    for path in (stopped / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:100])
    with (
        pytest.warns(UserWarning, match="Resuming from"),
        pytest.raises(ValueError, match=r"no snapshot in .* is good"),
    ):
        run(stopped)


def test_batches_of_another_size_are_told_and_each_example_is_seen_once(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", stop=5)
    with pytest.warns(UserWarning, match="continues, but not as it would"):
        run(tmp_path / "run", "data.batch_size=4")
    # 5 batches of 8, then those of 4 that make up the rest of this epoch and the next.
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 5 + 6 + 16


def test_weights_alone_are_not_gone_on_from(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="not the position of its training: resume from last"):
        run(tmp_path / "again", f"resume='{tmp_path}/run/checkpoints/best.ckpt'")


def test_resume_names_a_file_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*lost\.ckpt"):
        run(tmp_path / "run", f"resume='{tmp_path}/lost.ckpt'")


@pytest.mark.parametrize("option", ["every_n_steps", "every_n_minutes"])
def test_snapshots_come_at_positive_distances(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a finite number above 0"):
        Snapshots("last.ckpt", **{option: 0})
