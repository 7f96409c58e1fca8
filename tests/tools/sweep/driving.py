"""Drivers as a shell starts them, with trials that are real processes."""

import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from tests.running import CONF

ROOT = CONF.parent
TRIALS = ("name=trials", "program=tests/tools/sweep/trial.py")
POINTS = "x=0.1,0.2,0.3,0.4,0.5,0.6"


def started(folder: Path, *arguments: str, points: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "thresher.sweep", *TRIALS, f"run.dir={folder}"]
    return subprocess.Popen(
        [*command, "heartbeat=0.5", "stale_after=3", *arguments, "--", *points],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str, points: tuple[str, ...]) -> tuple[int, str]:
    driver = started(folder, *arguments, points=points)
    output, _ = driver.communicate(timeout=120)
    return driver.returncode, output


def trials(folder: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="trials", storage=f"sqlite:///{folder / 'study.db'}").trials


def finished(folder: Path) -> Counter[str]:
    return Counter(t.user_attrs["slot"] for t in trials(folder) if t.state == TrialState.COMPLETE)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


def seeds(count: int) -> str:
    return "seed=" + ",".join(map(str, range(count)))
