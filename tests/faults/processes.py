"""Trainings as processes of their own, to do harm to."""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.running import CONF, TINY
from tests.warm import Command

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
SNAPSHOTS = "callbacks.last_checkpoint.every_n_steps=1"
# 2 epochs of 12 steps, a snapshot after each.
SHORT = (*TINY, "data.limit_train=48", "data.batch_size=4", "callbacks.watch.moved=0", SNAPSHOTS)


def begin(folder: Path, *overrides: str) -> Command:
    """Start a training in a group of processes of its own."""
    command = [str(ROOT / "train.py"), *SHORT, f"run.dir='{folder}'", *overrides]
    return Command(command, env=ENVIRONMENT, merge=True)


def finish(process: Command, timeout: float = 240) -> tuple[int, str]:
    """Wait for a training; return its exit code and what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.wait(), output


def until(path: Path, process: Command, timeout: float = 240) -> None:
    """Wait until a training has written a file."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
