"""kill -9 at random moments: nothing is lost but time."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.checkpoints.test_resume import assert_same
from tests.faults.processes import ENVIRONMENT, begin, finish, until
from tests.warm import Command
from thresher.checkpoints import files
from thresher.checkpoints.load import load_checkpoint

LONG = ("trainer.max_epochs=30", "attention=mca", "data.augment=crop_flip", "test=true")
WRITER = """
import sys, torch
from thresher.checkpoints.save import CheckpointFiles
files = CheckpointFiles({"config": {}, "classes": []})
step = 0
while True:
    state = {"weight": torch.full((2_000_000,), float(step))}
    files.save_checkpoint({"state_dict": state, "step": step}, sys.argv[1] + "/last.ckpt")
    print(step, flush=True)
    step += 1
"""


def kill(process: Command) -> str:
    """Kill a training and whatever it started; return what it printed."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_training_that_was_killed_ends_as_one_that_was_not(kills: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = finish(begin(whole, *LONG))
    assert code == 0, output
    chance = random.Random(kills)
    done, newest = 0, killed / "checkpoints" / "last.ckpt"
    steps = []
    while done < kills:
        before = newest.stat().st_mtime_ns if newest.exists() else 0
        process = begin(killed, *LONG)
        while not newest.exists() or newest.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
        assert process.poll() is None, f"it ended before kill {done + 1}: {process.communicate()[0]}"
        kill(process)
        done += 1
        steps.append(load_checkpoint(newest)["global_step"])
    assert steps == sorted(steps)
    assert steps[-1] < 360, "the training was over before the last kill"
    code, output = finish(begin(killed, *LONG))
    assert code == 0, output
    assert "resumes from" in output
    assert_same(whole, killed)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one(kills: int, tmp_path: Path) -> None:
    chance = random.Random(kills)
    halfway = 0
    writer = tmp_path / "writer.py"
    writer.write_text(WRITER)
    for _ in range(kills):
        process = Command([str(writer), str(tmp_path)], env=ENVIRONMENT)
        while len(process.read().splitlines()) < 2:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        assert process.poll() is None
        promised = int((kill(process).split() or ["1"])[-1])
        halfway += any(tmp_path.glob("*.partial"))
        files.remove_leftovers(tmp_path)
        assert not list(tmp_path.glob("*.partial"))
        newest = load_checkpoint(tmp_path / "last.ckpt")
        assert newest["step"] >= promised
        assert bool((newest["state_dict"]["weight"] == newest["step"]).all())
        assert load_checkpoint(tmp_path / "previous.ckpt")["step"] in (newest["step"] - 1, newest["step"])
    assert halfway, "no kill met a file that was being written"


def test_a_truncated_snapshot_gives_way_to_the_one_before(tmp_path: Path) -> None:
    process = begin(tmp_path / "run", *LONG)
    until(tmp_path / "run" / "checkpoints" / "previous.ckpt", process)
    kill(process)
    newest = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = newest.read_bytes()
    newest.unlink()  # for a moment of each write it is the same file as the one before
    newest.write_bytes(whole[:-1])
    code, output = finish(begin(tmp_path / "run", *LONG))
    assert code == 0, output
    assert "last.ckpt cannot be read" in output
    assert "Resuming from the snapshot before it" in output
