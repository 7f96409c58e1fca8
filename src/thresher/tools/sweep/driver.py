"""The driver: start trials, watch them, record how they end, and adopt the trials of dead drivers."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from thresher.config.overrides import quote
from thresher.results.outcome import OUTPUT, read_curve, read_exit_code, read_last_words, read_outcome
from thresher.tools.sweep.launchers import JobName, Launcher
from thresher.tools.sweep.ledger import Ledger, State, View
from thresher.tools.sweep.pruning import Pruning
from thresher.tools.sweep.pulse import Pulse

STORAGE_PATIENCE = 300.0  # seconds without an answer from the storage


@dataclass(frozen=True)
class Settings:
    """The options of a driver.

    Args:
        command: The program and its first arguments; overrides follow.
        folder: Of the sweep; each trial gets a folder in it.
        workers: Trials at a time.
        timeout: Seconds that a trial may take.
        max_failures: The driver starts no trial after more failures than this; None: it never stops.
        heartbeat: Seconds between two signs of life.
        stale_after: Seconds without a sign of life after which a driver on another machine counts as dead.
        grace: Seconds between a request to stop and SIGKILL.
        poll: Seconds between two looks at the children.
        settle: Seconds by which the exit code of a cluster job may arrive late.
    """

    command: Sequence[str]
    folder: Path
    workers: int = 1
    timeout: float | None = None
    max_failures: int | None = None
    heartbeat: float = 10.0
    stale_after: float = 60.0
    grace: float = 15.0
    poll: float = 0.05
    settle: float = 10.0


@dataclass
class Job:
    """A trial that this driver watches."""

    slot: str
    number: int
    folder: Path
    name: JobName
    since: float | None = None  # when its output first existed
    stopping: str | None = None  # reason of a request to stop
    deadline: float = 0.0  # of stopping, or of settling
    adopted: bool = False  # another driver started it
    curve: dict[int, tuple[float, ...]] | None = None


class Driver:
    """Runs the trials that are left in a ledger.

    Args:
        ledger: The shared study.
        launcher: Starts and stops trials.
        settings: Options.
        pruning: Decides when to stop a trial early; None: never.
        report: Called with the view of the study and the number of own trials, after each change and every second.
    """

    def __init__(
        self,
        ledger: Ledger,
        launcher: Launcher,
        settings: Settings,
        pruning: Pruning | None = None,
        report: Callable[[View, int], None] = lambda view, own: None,
    ) -> None:
        self._ledger = ledger
        self._launcher = launcher
        self._settings = settings
        self._pruning = pruning
        self._report = report
        self._pulse = Pulse(ledger.driver, settings.stale_after)
        self._jobs: list[Job] = []
        self._signals: list[int] = []
        self._next_beat = self._next_look = 0.0

    def run(self) -> int:
        """Run until no trial is left; return 0, 1 after too many failures, or 128 + the number of a signal."""
        answered = time.monotonic()
        with self._catch_signals():
            while True:
                try:
                    done = self._step()
                    answered = time.monotonic()
                except StorageInternalError as error:
                    if time.monotonic() - answered > STORAGE_PATIENCE:
                        raise ConnectionError(
                            f"the storage has not answered for {STORAGE_PATIENCE:.0f} s ({error}). Trials keep "
                            "running; rerun the same command to adopt them"
                        ) from error
                    done = None
                    time.sleep(1.0)
                if done is not None:
                    self._ledger.beat(ended=True)
                    return done
                time.sleep(self._settings.poll)

    def _step(self) -> int | None:
        """Do the next step; return the exit code when nothing is left to do."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._ledger.beat()
            self._next_beat = now + self._settings.heartbeat
        changed = self._watch_jobs()
        if self._signals:
            self._interrupt()
            return None if self._jobs and not self._launcher.outlives else 128 + self._signals[0]
        if not changed and now < self._next_look:
            return None
        self._next_look = now + 1.0
        view = self._ledger.view()
        self._release_taken(view)
        self._adopt_lost(view)
        self._prune(view)
        failed = len(view.in_states(State.FAILED))
        stopped = self._settings.max_failures is not None and failed > self._settings.max_failures
        while not stopped and not self._signals and len(self._jobs) < self._settings.workers and self._start():
            pass
        # The next attempts are created while trials run, not between two of them.
        view = self._ledger.view() if stopped or self._signals else self._ledger.refill()
        self._report(view, len(self._jobs))
        if self._jobs or (not stopped and view.in_states(State.LEFT, State.RUNNING)):
            return None
        return 1 if stopped else 0

    # Starting

    def _start(self) -> bool:
        """Start the next trial; return whether there was one."""
        claim = self._ledger.claim()
        if claim is None:
            return False
        folder = make_folder(self._settings.folder, claim.number)
        command = [*self._settings.command, *claim.overrides, f"run.dir={quote(str(folder))}"]
        name = self._launcher.start(command, folder)
        run = {
            "driver": self._ledger.driver,
            "folder": folder.name,
            "overrides": list(claim.overrides),
            "job": name,
        }
        if self._ledger.note(claim.number, run=run):
            self._launcher.release(name)
            self._jobs.append(Job(claim.slot, claim.number, folder, name))
        else:
            self._launcher.stop(name, force=True)
        return True

    # Watching

    def _watch_jobs(self) -> bool:
        """Look at every job once; return whether one has ended."""
        ended = False
        for job in list(self._jobs):
            now = time.monotonic()
            if job.since is None and (job.folder / OUTPUT).exists():
                job.since = now
            if not self._launcher.is_running(job.name):
                if self._has_settled(job, now):
                    self._finish(job)
                    self._jobs.remove(job)
                    ended = True
            elif job.stopping is not None:
                if now >= job.deadline:
                    self._launcher.stop(job.name, force=True)
            elif self._settings.timeout is not None and now - (job.since or now) > self._settings.timeout:
                self._stop(job, "timeout")
        return ended

    def _has_settled(self, job: Job, now: float) -> bool:
        """Tell whether the files of an ended job are complete: a shared folder may show its exit code late."""
        if not self._launcher.outlives or job.stopping is not None or read_exit_code(job.folder) is not None:
            return True
        job.deadline = job.deadline or now + self._settings.settle
        return now >= job.deadline

    def _stop(self, job: Job, why: str) -> None:
        job.stopping = why
        job.deadline = time.monotonic() + self._settings.grace
        self._launcher.stop(job.name, force=False)

    def _finish(self, job: Job) -> None:
        """Record how a job ended."""
        if job.stopping == "interrupt":
            self._ledger.lose(job.number, "its driver was interrupted", counts=False)
        elif job.stopping == "prune":
            self._ledger.finish(job.number, TrialState.PRUNED)
        elif job.stopping == "timeout":
            reason = f"no result after {self._settings.timeout:g} s; its last output:\n{read_last_words(job.folder)}"
            self._ledger.finish(job.number, TrialState.FAIL, failure=reason)
        elif job.adopted and read_exit_code(job.folder) is None:
            self._ledger.lose(job.number, "it was gone, and so was its driver", counts=True)
        else:
            outcome = read_outcome(job.folder, list(self._ledger.plan.objectives))
            if outcome.values is None:
                self._ledger.finish(job.number, TrialState.FAIL, failure=outcome.reason)
            else:
                self._ledger.finish(job.number, TrialState.COMPLETE, outcome.values)

    def _prune(self, view: View) -> None:
        if self._pruning is None:
            return
        curves = {t.number: _read_stored_curve(t) for t in view.latest.values() if "curve" in t.user_attrs}
        for job in self._jobs:
            curve = read_curve(job.folder, self._pruning.monitor)
            if job.stopping is not None or not curve or curve == job.curve:
                continue
            job.curve = curve
            self._ledger.note(job.number, curve=curve)
            others = [other for number, other in curves.items() if number != job.number]
            if self._pruning.is_dominated(curve, others):
                self._stop(job, "prune")

    # Trials of other drivers

    def _release_taken(self, view: View) -> None:
        """Release jobs that another driver has adopted, and stop those whose trial was given up."""
        for job in list(self._jobs):
            trial = view.latest.get(job.slot)
            if trial is None or trial.number != job.number or trial.state != TrialState.RUNNING:
                self._launcher.stop(job.name, force=True)
            elif trial.user_attrs["run"]["driver"] == self._ledger.driver:
                continue
            self._jobs.remove(job)

    def _adopt_lost(self, view: View) -> None:
        """Adopt, finish or give up the trials of dead drivers."""
        dead = self._pulse.find_dead(view.drivers)
        alone = not view.drivers.keys() - dead - {self._ledger.driver}
        mine = {job.number for job in self._jobs}
        for trial in view.running():
            run = trial.user_attrs.get("run")
            if trial.number in mine:
                continue
            if run is None:
                # Claimed, but not started: its driver is about to start it, unless it is dead.
                if alone or self._pulse.is_unchanged(f"trial {trial.number}", "claimed"):
                    self._ledger.lose(trial.number, "its driver was gone before it started", counts=False)
            elif run["driver"] in dead or run["driver"] == self._ledger.driver:
                self._adopt(trial, run)

    def _adopt(self, trial: FrozenTrial, run: dict[str, Any]) -> None:
        folder = self._settings.folder / run["folder"]
        job = Job(trial.user_attrs["slot"], trial.number, folder, run["job"], adopted=True)
        if self._launcher.can_watch(job.name) and self._launcher.is_running(job.name):
            if self._ledger.note(trial.number, run=run | {"driver": self._ledger.driver}):
                self._jobs.append(job)
        else:
            self._finish(job)

    # Interrupts

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Collect signals instead of dying from them, while it is entered."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            again = "" if self._launcher.outlives else "; a second signal kills the trials"
            print(f"\nstopping{again}", file=sys.stderr, flush=True)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        """Stop the jobs that die with this driver; their trials wait for the next one."""
        if self._launcher.outlives:
            return
        for job in self._jobs:
            if job.stopping != "interrupt" and read_exit_code(job.folder) is None:
                self._stop(job, "interrupt")
            if len(self._signals) > 1:
                job.deadline = 0.0


def _read_stored_curve(trial: FrozenTrial) -> dict[int, tuple[float, ...]]:
    return {int(epoch): tuple(values) for epoch, values in trial.user_attrs["curve"].items()}


def make_folder(parent: Path, number: int) -> Path:
    """Make a new folder for a trial, so that nothing is overwritten."""
    parent.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}", *(f"{number:04d}-{i}" for i in range(2, 10_000))]
    for name in names:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        return parent / name
    raise FileExistsError(f"{parent} has too many folders for trial {number}")
