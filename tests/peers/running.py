"""Run one family's tests in a child process, and read how they ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from tests.peers.families import Family

INSIDE = Path(__file__).parent / "inside"
REPOSITORY = Path(__file__).parents[2]
WITHOUT = "without"
MODES = ("dense", "topk", "latte")
_POLL = 0.5  # seconds between two looks at a child


@dataclass
class Outcome:
    """How a family's tests ended in one mode.

    Attributes:
        outcomes: "passed", "failed", "skipped" or "unfinished" for each test.
        errors: The message of each test that failed.
        sparsified: How many mechanisms each class of model got, the most seen.
        left_dense: Classes of models that got none, with the refusals.
        seconds: What the child took.
        stopped: Why the child did not end by itself, or "".
        partial: Whether only some tests were asked for.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    sparsified: dict[str, int] = field(default_factory=dict)
    left_dense: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""
    partial: bool = False

    def holds(self, tests: Collection[str]) -> bool:
        """Say whether it tells of these tests, of all if there are none."""
        return not self.partial or (bool(tests) and set(tests) <= set(self.outcomes))

    def named(self, outcome: str) -> set[str]:
        """Return the tests that ended so."""
        return {test for test, value in self.outcomes.items() if value == outcome}


def run(
    family: Family,
    mode: str,
    root: Path,
    log: Path,
    *,
    tests: Collection[str] = (),
    timeout: float,
    test_timeout: float,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Run the tests of `family` in `root` with the mechanism `mode`, and return how they ended.

    Args:
        family: Whose tests.
        mode: One of `MODES`, or `WITHOUT`.
        root: The folder that holds `tests`.
        log: The file that the child writes; what it prints lies beside it.
        tests: The only tests to run; all of them by default.
        timeout: Seconds that the child may take.
        test_timeout: Seconds that a test may take.
        progress: Is told now and then how many tests have begun.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    command = [
        sys.executable,
        "-m",
        "pytest",
        family.file,
        f"--rootdir={root}",
        "--quiet",
        "--tb=short",
        "--durations=15",
    ]
    command += ["-pno:xdist", "-pno:cacheprovider", "-oaddopts=", "-olog_cli=0", f"--timeout={test_timeout}"]
    command += ["-ppeers_plugin", f"--peers-mode={mode}", f"--peers-library={family.library}"]
    command += [f"--peers-log={log.resolve()}", f"--peers-models={','.join(family.models)}"]
    if tests:
        named = log.with_suffix(".tests")
        named.write_text("".join(f"{test}\n" for test in sorted(tests)))
        command += [f"--peers-tests={named.resolve()}"]
    begun, stopped = time.monotonic(), ""
    with log.with_suffix(".txt").open("w") as printed, _start(command, root, printed) as child:
        try:
            while child.poll() is None and not stopped:
                progress(_begun(log))
                time.sleep(_POLL)
                if time.monotonic() - begun > timeout:
                    stopped = f"stopped after {timeout:.0f} s"
        finally:
            child.kill()
    if not stopped and child.returncode not in (0, 1):  # pytest's own: tests passed, tests failed
        stopped = f"ended with exit status {child.returncode}; see {log.with_suffix('.txt')}"
    outcome = read(log)
    outcome.partial = bool(tests)
    outcome.seconds, outcome.stopped = round(time.monotonic() - begun, 1), stopped
    return outcome


def read(log: Path) -> Outcome:
    """Read what a child has written."""
    outcome = Outcome()
    for text in (
        log.read_text().rpartition("\n")[0].splitlines()
    ):  # the last line of a process that was killed has no end
        line = json.loads(text)
        if "model" in line:
            _note_model(outcome, line)
        elif line["outcome"] == "begun":
            outcome.outcomes[line["test"]] = "unfinished"
        elif outcome.outcomes.get(line["test"]) != "failed":  # a failure of a part, or at the end, stays
            outcome.outcomes[line["test"]] = line["outcome"]
            if line["outcome"] == "failed":
                outcome.errors[line["test"]] = line["error"]
    return outcome


def save(outcome: Outcome, path: Path, stamp: dict[str, str]) -> None:
    """Keep an outcome with what it depends on."""
    path.write_text(json.dumps({"stamp": stamp, **asdict(outcome)}, indent=1))


def load(path: Path, stamp: dict[str, str] | None = None) -> Outcome | None:
    """Return an outcome that was kept, if it depends on the same as now."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    made_of = kept.pop("stamp")
    return Outcome(**kept) if stamp is None or made_of == stamp else None


def _note_model(outcome: Outcome, line: dict) -> None:
    name = line["model"]
    if line["mechanisms"]:
        outcome.sparsified[name] = max(line["mechanisms"], outcome.sparsified.get(name, 0))
    else:
        outcome.left_dense[name] = line["refusals"]


def _begun(log: Path) -> int:
    return log.read_text().count('"outcome": "begun"')


def _start(command: list[str], root: Path, printed: IO[str]) -> subprocess.Popen:
    paths = [INSIDE, REPOSITORY / "src", root]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in [name for name in environment if name.startswith(("PYTEST_", "HYDRA_"))]:
        del environment[name]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=printed, stderr=subprocess.STDOUT)
