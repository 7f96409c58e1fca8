"""Samplers that propose points, each in a sweep with trials that are real processes."""

import statistics
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.tools.sweep.driving import run, trials
from thresher.tools.sweep.samplers import check_sampler

SPACE = ("x=interval(0.0,1.0)", "sleep=0")
STARTUP = 10  # trials that TPE and GP draw at random


def proposed(folder: Path, sampler: str, count: int, *arguments: str) -> list[float]:
    code, output = run(folder, f"sampler={sampler}", f"trials={count}", *arguments, points=SPACE)
    assert code == 0, output
    assert f"done {count} of {count}" in output
    done = [trial for trial in trials(folder) if trial.state == TrialState.COMPLETE]
    assert len(done) == count
    return [trial.params["x"] for trial in sorted(done, key=lambda trial: trial.number)]


def test_random_points_are_those_of_the_seed_and_what_was_run(tmp_path: Path) -> None:
    points = proposed(tmp_path / "a", "random", 3)
    assert len(set(points)) == 3
    for trial in trials(tmp_path / "a"):
        assert trial.values == pytest.approx([trial.params["x"], 1 - trial.params["x"]])
    assert proposed(tmp_path / "b", "random", 3) == points
    assert proposed(tmp_path / "c", "random", 3, "seed=1") != points


@pytest.mark.parametrize(
    ("sampler", "arguments"), [("gp", ["maximize=[test/acc]", "minimize=[]"]), ("tpe", ["workers=2"])]
)
def test_what_was_seen_leads_to_better_points(tmp_path: Path, sampler: str, arguments: list[str]) -> None:
    """With one objective and one worker, and with two of each; x = 1 is best in both."""
    points = proposed(tmp_path, sampler, STARTUP + 4, *arguments)
    assert all(0 <= point <= 1 for point in points)
    assert statistics.fmean(points[STARTUP:]) > statistics.fmean(points[:STARTUP]) + 0.1


def test_nsga2_breeds_a_second_generation(tmp_path: Path) -> None:
    proposed(tmp_path, "nsga2", 23)
    generations = [v for t in trials(tmp_path) for k, v in t.system_attrs.items() if k.endswith(":generation")]
    assert max(generations) >= 1


def test_gp_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sampler("gp")
    monkeypatch.setitem(sys.modules, "scipy", None)
    check_sampler("tpe")
    with pytest.raises(ValueError, match=r"sampler=gp needs SciPy: pip install 'thresher\[sweep\]'"):
        check_sampler("gp")
