"""Two processes compute what one does, and end together."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.checkpoints.test_resume import assert_same
from tests.faults.processes import ENVIRONMENT, ROOT, SHORT, begin, finish, until
from tests.warm import Command
from thresher.checkpoints.load import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
SAME = ("trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0", "~callbacks.calibrate")
TIMEOUT = 240  # starting two processes takes most of it on a busy machine


def spied(folder: Path) -> tuple[str, ...]:
    return ("+callbacks.ranks._target_=tests.faults.ranks.Ranks", f"+callbacks.ranks.folder='{folder}/ranks'")


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / "ranks" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def run(folder: Path, *overrides: str, code: int = 0) -> str:
    got, output = finish(begin(folder, *overrides))
    assert got == code, output
    return output


def column(folder: Path, name: str) -> list[float]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def others_of(process: Command) -> list[int]:
    """Return the processes of a training's group that still run, other than the first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != process.pid:
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == process.pid and state != "Z":
                found.append(int(entry.name))
    return found


def assert_all_end(process: Command) -> str:
    code, output = finish(process, TIMEOUT)
    assert code != 0
    wait_for_others(process)
    return output


def wait_for_others(process: Command) -> None:
    """Wait until the processes that a training started have ended as it has."""
    began = time.monotonic()
    while others_of(process):
        assert time.monotonic() - began < TIMEOUT, others_of(process)
        time.sleep(0.1)


@pytest.mark.parametrize("compute", ["lagrangian", "penalty"])
def test_two_processes_are_one_with_a_doubled_batch(compute: str, tmp_path: Path) -> None:
    budget = (f"compute={compute}", "compute.start=0", "attention.threshold=1")
    run(tmp_path / "two", *TWO, *SAME, *budget, *spied(tmp_path / "two"), "test=false")
    run(tmp_path / "one", *SAME, *budget, "data.batch_size=8", "test=false")
    first, second = (each["state"] for each in ranks(tmp_path / "two"))
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]
    alone = load_checkpoint(tmp_path / "one" / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in first.items():
        torch.testing.assert_close(value, alone[f"net.{name}"], rtol=1e-4, atol=1e-5)
    for name in ("train/kept", "train/compute", "train/compute_loss", "val/loss", "val/kept", "val/compute"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-4), name


def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    run(tmp_path / "run", "trainer.max_epochs=1", "test=false")
    evaluate = (f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'", "trainer.limit_test_batches=1.0")
    for name, more in (("one", ()), ("two", (*TWO, "data.batch_size=63"))):
        command = [str(ROOT / "eval.py"), *evaluate, *more, f"run.dir='{tmp_path}/{name}'"]
        done = warm.run(command, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert {name for name in one if name.startswith("test/")} == {
        f"test/{x}" for x in ("acc", "loss", "kept", "compute")
    }
    assert two == pytest.approx(one, rel=1e-5)
    heads = [json.loads((tmp_path / name / "heads.json").read_text())["layers"] for name in ("one", "two")]
    for alone, shared in zip(*heads, strict=True):
        for head, other in zip(alone["heads"], shared["heads"], strict=True):
            assert other == pytest.approx(head, rel=1e-5)


@pytest.mark.parametrize("attention", ["mca", "yoso", "smyrf", "latte"])
def test_stochastic_mechanisms_draw_differently_in_each_process_and_alike_again(attention: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(
            tmp_path / name,
            *TWO,
            f"attention={attention}",
            *spied(tmp_path / name),
            "trainer.max_epochs=1",
            "test=false",
        )
    (first, second), again = ranks(tmp_path / "a"), ranks(tmp_path / "b")
    alike = [torch.equal(a, b) for a, b in zip(first["draws"], second["draws"], strict=True)]
    assert len(alike) == 6
    assert not any(alike[1:]) if attention != "latte" else all(alike)  # the head begins as zero
    for before, now in zip((first, second), again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before["draws"], now["draws"], strict=True))


def test_a_killed_process_ends_all(tmp_path: Path) -> None:
    process = begin(tmp_path / "run", *TWO, "trainer.max_epochs=1000")
    until(tmp_path / "run" / "checkpoints" / "last.ckpt", process)
    (other,) = others_of(process)
    os.kill(other, signal.SIGKILL)
    assert_all_end(process)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0


def test_a_process_that_raises_ends_all(tmp_path: Path) -> None:
    process = begin(tmp_path / "run", *TWO, *spied(tmp_path / "run"), "+callbacks.ranks.fails=1")
    assert "process 1 broke" in assert_all_end(process)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_signal_to_one_stops_all_with_a_snapshot_that_two_go_on_from(trainer: str, tmp_path: Path) -> None:
    two = (f"trainer={trainer}", *TWO[1:])
    many = ("attention=mca", "trainer.max_epochs=4", "data.augment=crop_flip", "test=false")
    many = many if trainer == "ddp" else (*many[1:], "compute=lagrangian", "compute.start=0")  # thresholds stay whole
    run(tmp_path / "whole", *two, *many)
    process = begin(tmp_path / "stopped", *two, *many)
    until(tmp_path / "stopped" / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, TIMEOUT)
    assert code == 143, output
    wait_for_others(process)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.ckpt")["global_step"] < 24
    run(tmp_path / "stopped", *two, *many)
    (tmp_path / "whole" / "heads.json").write_text("")  # no test, no heads
    (tmp_path / "stopped" / "heads.json").write_text("")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_training_goes_on_with_fewer_and_more_processes_and_says_so(tmp_path: Path) -> None:
    """2 epochs of 6 steps by two, then 2 of 12 by one, then 2 of 6 by two."""
    run(tmp_path / "run", *TWO, "trainer.max_epochs=2", "test=false")
    output = run(tmp_path / "run", "trainer.max_epochs=4", "test=false")
    assert "continues, but not as it would have without the interruption" in output
    run(tmp_path / "run", *TWO, "trainer.max_epochs=6", "test=false")
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 12 + 24 + 12
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train/seconds"] > 0


def test_torchrun_starts_what_lightnings_own_launcher_does(tmp_path: Path) -> None:
    run(tmp_path / "own", *TWO, "test=false")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "train.py"), *SHORT, *TWO, f"run.dir='{tmp_path}/torchrun'", "test=false"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("own", "torchrun"):
        (tmp_path / name / "heads.json").write_text("")
    assert_same(tmp_path / "own", tmp_path / "torchrun")
