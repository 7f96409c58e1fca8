"""Sweeps from the command line, with trials that are real processes: killed, shared, failing, refused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.programs import postgresql
from tests.tools.sweep.driving import POINTS, ROOT, TRIALS, finished, free_port, run, seeds, started, trials
from thresher.tools.sweep.command import sweep


def test_a_driver_killed_five_times_finishes_every_trial_once(tmp_path: Path) -> None:
    """What a killed driver had started goes on, and is taken over by the next."""
    rng, points = random.Random(0), (POINTS, seeds(5), "sleep=0.2")
    for _ in range(5):
        driver = started(tmp_path, "workers=2", points=points)
        assert driver.stdout is not None
        while "trials by grid" not in driver.stdout.readline():
            assert driver.poll() is None
        time.sleep(rng.uniform(0.2, 1.5))
        driver.kill()
        driver.communicate()
    before = finished(tmp_path)
    code, output = run(tmp_path, "workers=2", points=points)
    assert code == 0, output
    assert len(before) < 30
    assert sorted(finished(tmp_path).values()) == [1] * 30
    assert "done 30 of 30" in output
    results = [json.loads(path.read_text())["test/acc"] for path in tmp_path.glob("*/metrics.json")]
    assert len(set(results)) == 30


def test_four_drivers_share_one_file(tmp_path: Path) -> None:
    drivers = [started(tmp_path, points=(POINTS, seeds(4))) for _ in range(4)]
    outputs = [driver.communicate(timeout=180)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 4, outputs
    assert sorted(finished(tmp_path).values()) == [1] * 24
    assert len({t.user_attrs["run"]["driver"] for t in trials(tmp_path) if t.state == TrialState.COMPLETE}) > 1


def test_a_finished_sweep_is_not_run_again(tmp_path: Path) -> None:
    assert run(tmp_path, points=("x=0.1,0.2",))[0] == 0
    number = len(trials(tmp_path))
    code, output = run(tmp_path, points=("x=0.1,0.2",))
    assert (code, len(trials(tmp_path))) == (0, number)
    for points in (("x=0.1,0.2",), ()):  # what was begun is known to the folder
        code, output = run(tmp_path, "mode=status", points=points)
        assert code == 0
        assert "done 2 of 2" in output


def test_failures_are_recorded_with_their_reason_and_end_a_sweep_of_too_many(tmp_path: Path) -> None:
    code, output = run(tmp_path, "max_failures=1", points=("x=-3,-2,-1,0.5",))
    assert code == 1
    assert "max_failures=1" in output
    failed = [t for t in trials(tmp_path) if t.state == TrialState.FAIL and "failure" in t.user_attrs]
    assert len(failed) == 2
    assert all("x must not be negative" in t.user_attrs["failure"] for t in failed)
    code, output = run(tmp_path, "max_failures=null", points=("x=-3,-2,-1,0.5",))
    assert code == 0
    assert "failed 3" in output


def test_a_trial_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    _, output = run(tmp_path, "timeout=1", points=("x=0.5", "sleep=0,60"))
    assert "failed 1" in output
    assert any("no result after 1 s" in t.user_attrs.get("failure", "") for t in trials(tmp_path))


def test_an_interrupted_sweep_says_how_to_go_on_and_where_it_stands(tmp_path: Path) -> None:
    points = ("x=0.5", "sleep=0,30,31,32")
    driver = started(tmp_path, points=points)
    assert driver.stdout is not None
    while len(list(tmp_path.glob("*/output.log"))) < 2:  # the first one is done
        time.sleep(0.05)
        assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "Rerun the same command to resume" in output
    assert not [t for t in trials(tmp_path) if t.user_attrs.get("failure")]
    code, output = run(tmp_path, "mode=status", points=points)
    assert code == 0, output
    assert "done 1 of 4" in output
    assert "best of 1 trials" in output or "Pareto front of 1 trials" in output


def test_a_trial_that_others_leave_behind_is_pruned(tmp_path: Path) -> None:
    arguments = ("prune.start=1", "prune.quorum=2", "maximize=[test/acc]", "minimize=[]", "prune.monitor=[val/acc]")
    _, output = run(tmp_path, *arguments, points=("x=0.9,0.8,0.1", "curve=40"))
    assert "pruned 1" in output
    assert [t.state for t in trials(tmp_path)].count(TrialState.PRUNED) == 1


def test_commands_for_any_other_scheduler_are_printed(tmp_path: Path) -> None:
    code, output = run(tmp_path, "launcher=print", points=("x=0.1,0.2",))
    assert code == 0
    commands = [line for line in output.splitlines() if "trial.py" in line]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True)
    assert "trial.py" not in run(tmp_path, "launcher=print", points=("x=0.1,0.2",))[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sampler=grd"], "there is no sampler=grd. Available: grid"),
        (["sampler=tpe"], "needs trials=N"),
        (["workers=0"], "workers=0 must be at least 1"),
        (["program=nowhere.py"], "there is no program"),
        (["heartbeet=1"], "heartbeat"),
        (["sweep=pareto_visoin"], "there is no sweep=pareto_visoin; did you mean pareto_vision"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(complaint)):
        sweep(ROOT, [*TRIALS, f"run.dir='{tmp_path}'", *arguments], ["x=0.1,0.2"])


def test_a_mistake_is_one_message_and_an_exit_code(tmp_path: Path) -> None:
    code, output = run(tmp_path, "sampler=grd", points=("x=0.1,0.2",))
    assert code == 1
    assert output.startswith("error: there is no sampler=grd")
    assert "Traceback" not in output
    assert not (tmp_path / "study.db").exists()


def test_drivers_share_a_journal(tmp_path: Path) -> None:
    storage = f"storage=journal:{tmp_path / 'journal.log'}"
    drivers = [started(tmp_path, storage, points=(POINTS, seeds(2))) for _ in range(2)]
    outputs = [driver.communicate(timeout=180)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert all("done 12 of 12" in output for output in outputs)
    assert len(list(tmp_path.glob("*/metrics.json"))) == 12


@pytest.fixture
def postgres() -> Iterator[str]:
    """Start a server of Debian's package in a folder of its own; yield its URL."""
    programs = postgresql()
    root = os.geteuid() == 0
    someone = ["runuser", "-u", "postgres", "--"] if root else []
    port = free_port()
    folder = Path(tempfile.mkdtemp())
    if root:
        shutil.chown(folder, "postgres")

    def call(program: str, *arguments: str) -> None:
        command = [*someone, str(programs / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    call("initdb", "--username=sweeps", "--auth=trust", "--no-sync")
    try:
        call("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -c fsync=off")
        yield f"postgresql://sweeps@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


def test_four_drivers_share_a_server_and_one_is_killed(tmp_path: Path, postgres: str) -> None:
    points = (POINTS, seeds(4), "sleep=0.2")
    drivers = [started(tmp_path, f"storage={postgres}", points=points) for _ in range(4)]
    while len(list(tmp_path.glob("*/metrics.json"))) < 3:
        time.sleep(0.1)
        assert drivers[0].poll() is None
    drivers[0].kill()
    outputs = [driver.communicate(timeout=180)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers[1:]] == [0] * 3, outputs
    assert all("done 24 of 24" in output for output in outputs[1:])
    results = [json.loads(path.read_text())["test/acc"] for path in tmp_path.glob("*/metrics.json")]
    assert len(results) == len(set(results)) == 24
