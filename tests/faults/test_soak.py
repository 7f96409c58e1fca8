"""200 short trainings in one process leave nothing behind: memory, open files and threads stay as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import ENVIRONMENT, ROOT
from tests.faults.soak import KINDS

RUNS = 200
WARM = 40  # runs after which caches of the libraries are full
GROWTH = 32 * 2**20  # bytes that memory may differ by from then on: less than 0.2 MiB a run


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_trainings_leave_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.soak", str(tmp_path), str(RUNS), str(len(KINDS))]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["runs"] for each in seen] == list(range(len(KINDS), RUNS + 1, len(KINDS)))
    warm = [each for each in seen if each["runs"] >= WARM]
    for what in ("files", "threads", "children"):
        assert len({each[what] for each in warm}) == 1, (what, seen)
    assert max(each["memory"] for each in warm) - warm[0]["memory"] < GROWTH, seen
    assert warm[0]["children"] == 0
    assert list(tmp_path.iterdir()) == []
