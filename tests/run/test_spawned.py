"""Trainings in processes that are forked or spawned: afterwards the first one knows what one process would."""

import csv
import json
import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.running import tiny_config
from thresher.callbacks.heads import HeadStatistics
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training
from thresher.run.spawned import find_error
from thresher.signals import Interrupted

FORK = ("trainer=ddp_sim", "trainer.strategy=ddp_fork", "data.batch_size=8")  # 16 in two processes
BUDGET = (
    "compute=target",
    "compute.target=0.001",
    "attention.threshold=1.0",
    "~callbacks.calibrate",
    "data.limit_train=32",
)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, float], list[str]]]:
    """Two processes, and one whose batches are as large as theirs together: folder, metrics, warnings."""
    found = {}
    for name, more in (("one", ()), ("two", FORK)):
        folder = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            metrics = training.train(tiny_config(folder, *BUDGET, *more))
        found[name] = folder, metrics, [str(each.message) for each in told]
    return found


def test_two_processes_train_and_test_and_leave_what_one_does(runs: Any) -> None:
    (one, single, _), (two, several, _) = runs["one"], runs["two"]
    assert json.loads((two / "metrics.json").read_text()) == several
    free = ("train/loss", "train/acc", "train/seconds")  # of a process's own examples, and of its clock
    assert several.keys() == single.keys()
    for name in several.keys() - free:
        assert several[name] == pytest.approx(single[name], rel=1e-4), name
    assert 0 < several["train/seconds"] < 60
    assert {path.name for path in (two / "checkpoints").iterdir()} == {p.name for p in (one / "checkpoints").iterdir()}
    heads = [json.loads((folder / "heads.json").read_text())["layers"] for folder in (one, two)]
    for alone, shared in zip(*heads, strict=True):
        # Gradients are summed in another order: a pair at its threshold may fall to the other side.
        kept = [head["kept"] for head in alone["heads"]]
        assert [head["kept"] for head in shared["heads"]] == pytest.approx(kept, rel=1e-4)
    ours, wanted = rows(two), rows(one)
    assert len(ours) == len(wanted) > 0
    for row, other in zip(ours, wanted, strict=True):
        assert {name for name, value in row.items() if value} == {name for name, value in other.items() if value}
        assert (row["step"], row["epoch"]) == (other["step"], other["epoch"])
    assert [row["test/acc"] for row in ours if row["test/acc"]]


def test_a_budget_that_no_epoch_held_is_told_by_several_processes_as_well(runs: Any) -> None:
    for name in ("one", "two"):
        assert [text for text in runs[name][2] if text.startswith("no epoch held the budget of 0.001")], name


def test_what_a_process_refuses_is_told_as_if_there_were_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^compute\.quantity=kept cannot be trained: nothing in attention=smyrf"):
        training.train(tiny_config(tmp_path, "attention=smyrf", "compute=target", *FORK))


def test_a_signal_to_the_process_that_waits_stops_all_and_the_same_command_goes_on(runs: Any, tmp_path: Path) -> None:
    waiting = os.getpid()
    again = tiny_config(tmp_path, *BUDGET, *FORK)

    def stop(_: object, trainer: Any, *__: object) -> None:
        if trainer.is_global_zero:
            os.kill(waiting, signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadStatistics, "on_validation_epoch_start", stop)
        with pytest.raises(Interrupted, match="SIGTERM"):
            training.train(again)
    assert not multiprocessing.active_children()
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2  # of 4
    metrics = training.train(again)
    free = {"train/seconds"}
    assert {n: v for n, v in metrics.items() if n not in free} == {
        n: v for n, v in runs["two"][1].items() if n not in free
    }
    assert len(rows(tmp_path)) == len(rows(runs["two"][0]))


def test_only_errors_for_a_user_are_told_in_place_of_a_traceback() -> None:
    def left(text: str) -> Any:
        return find_error(ProcessRaisedException(f"\n\n-- Process 1 failed:\nTraceback\n  File x\n{text}\n", 1, 2))

    assert repr(left("thresher.tasks.finite.NonFiniteError: step 3: NaN\nhint: lower it")) == repr(
        ValueError("step 3: NaN\nhint: lower it")
    )
    assert repr(left("OSError: [Errno 2] none: 'x'")) == repr(OSError("[Errno 2] none: 'x'"))
    assert isinstance(left("RuntimeError: broke"), ProcessRaisedException)
    assert isinstance(left("KeyError"), ProcessRaisedException)
