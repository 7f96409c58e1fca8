"""200 short trainings in one process leave nothing behind: memory, open files and threads stay as they are."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.faults.processes import ENVIRONMENT, ROOT
from tests.faults.soak import KINDS, held

RUNS = 200
WARM = 40  # runs after which caches of the libraries are full
GROWTH = 16 * 2**20  # bytes that the least memory of the second half may be above that of the first


def test_what_a_process_holds_is_seen(tmp_path: Path) -> None:
    before = held()
    goes_on = threading.Event()
    thread = threading.Thread(target=goes_on.wait)
    thread.start()
    child = subprocess.Popen(["sleep", "60"])
    with (tmp_path / "open").open("wb"):
        block = bytearray(b"x" * 64 * 2**20)
        after = held()
    goes_on.set()
    thread.join()
    child.kill()
    child.wait()
    assert len(block) == 64 * 2**20
    assert {name: after[name] - before[name] for name in ("files", "threads", "children")} == dict.fromkeys(
        ("files", "threads", "children"), 1
    )
    assert after["memory"] - before["memory"] > 32 * 2**20


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
    memory = [each["memory"] for each in warm]
    half = len(memory) // 2
    assert min(memory[half:]) - min(memory[:half]) < GROWTH, seen
    assert warm[0]["children"] == 0
    assert list(tmp_path.iterdir()) == []
