"""The status of a sweep: one line while it runs, tables at its end."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.console import format_time
from thresher.results.pareto import find_pareto_front
from thresher.tools.sweep import processes
from thresher.tools.sweep.ledger import State, View

ROWS = 20  # rows of a table


def find_stale(view: View, patience: float, now: float | None = None) -> list[FrozenTrial]:
    """Find the trials whose driver gives no sign of life; clocks must agree within `patience` seconds."""
    now = time.time() if now is None else now

    def lives(driver: Mapping[str, Any]) -> bool:
        if driver["ended"]:
            return False
        return processes.is_alive(driver) if processes.is_here(driver) else now - driver["beat"] < patience

    living = {name for name, driver in view.drivers.items() if lives(driver)}
    started = [trial for trial in view.running() if "run" in trial.user_attrs]
    return [trial for trial in started if trial.user_attrs["run"]["driver"] not in living]


def estimate_seconds_left(view: View, workers: int) -> float | None:
    """Estimate the seconds that are left from the mean of the finished trials; None while there is none."""
    took = [
        (trial.datetime_complete - trial.datetime_start).total_seconds()
        for slot in view.in_states(State.DONE)
        if (trial := view.latest[slot]).datetime_complete is not None and trial.datetime_start is not None
    ]
    if not took:
        return None
    mean = sum(took) / len(took)
    now = time.time()
    begun = [trial.datetime_start.timestamp() for trial in view.running() if trial.datetime_start is not None]
    rest = sum(max(mean - (now - start), 0.0) for start in begun)
    return (rest + mean * len(view.in_states(State.LEFT))) / max(workers, 1)


def describe_status(view: View, own: int, patience: float, workers: int) -> str:
    """Describe the status of a sweep in one line.

    Args:
        view: The study.
        own: Trials of this driver.
        patience: Seconds after which a driver that gives no sign of life counts as dead.
        workers: Trials that this driver can run at a time; others are counted while they run some.
    """
    gone = len(find_stale(view, patience))
    running = len(view.in_states(State.RUNNING)) - gone
    left = len(view.in_states(State.LEFT))
    time_left = estimate_seconds_left(view, max(workers + running - own, 1))
    parts = [
        f"done {len(view.in_states(State.DONE))} of {len(view.states)}",
        f"running {running}" + (f" ({own} here)" if running != own else ""),
        f"failed {len(view.in_states(State.FAILED))}",
        *([f"pruned {n}"] if (n := len(view.in_states(State.PRUNED))) else []),
        f"stale {gone}",
        f"left {left}",
        f"time left {format_time(time_left)}" if left or running or gone else "",
    ]
    return "  ".join(part for part in parts if part)


class StatusLine:
    """Prints the status: over itself on a terminal, else after each change and every minute.

    Args:
        patience: Seconds after which a driver counts as dead.
        workers: Trials that this driver can run at a time.
    """

    def __init__(self, patience: float, workers: int) -> None:
        self._patience = patience
        self._workers = workers
        self._last: tuple[object, ...] = ()
        self._next = 0.0
        self._over = sys.stdout.isatty()

    def __call__(self, view: View, own: int) -> None:
        counts = tuple(len(view.in_states(state)) for state in State)
        now = time.monotonic()
        if not self._over and counts == self._last and now < self._next:
            return
        self._last, self._next = counts, now + 60
        text = describe_status(view, own, self._patience, self._workers)
        print(f"\r\033[K{text}" if self._over else text, end="" if self._over else "\n", flush=True)

    def close(self) -> None:
        """End the line."""
        if self._over:
            print(flush=True)


def print_tables(view: View, objectives: Mapping[str, str], folder: Path, console: Console) -> None:
    """Print the best trials, and the failed ones with their reasons."""
    done, failed = ([view.latest[slot] for slot in view.in_states(state)] for state in (State.DONE, State.FAILED))
    best = find_best(done, objectives)
    if best:
        kind = "best" if len(objectives) == 1 else "Pareto front"
        table = Table(title=f"{kind} of {len(done)} trials", title_justify="left")
        for name in (*objectives, "folder", "overrides"):
            table.add_column(name, overflow="fold")
        shared = set.intersection(*(set(trial.user_attrs["run"]["overrides"]) for trial in done))
        for trial in best[:ROWS]:
            run = trial.user_attrs["run"]
            values = (f"{value:.4f}" for value in trial.values)
            own = [override for override in run["overrides"] if override not in shared]
            table.add_row(*values, run["folder"], escape(" ".join(own)))
        _print_table(console, table, len(best))
    if failed:
        table = Table(title="failed", title_justify="left")
        for name in ("folder", "why"):
            table.add_column(name, overflow="fold")
        for trial in failed[:ROWS]:
            table.add_row(trial.user_attrs.get("run", {}).get("folder", "-"), escape(describe_failure(trial)))
        _print_table(console, table, len(failed))
    report = f"results are in {folder}; python -m thresher.report runs={folder} draws them"
    console.print(report, soft_wrap=True, markup=False, highlight=False)


def _print_table(console: Console, table: Table, rows: int) -> None:
    if rows > ROWS:
        table.caption = f"and {rows - ROWS} more"
    console.print(table)


def describe_failure(trial: FrozenTrial) -> str:
    """Explain why a trial failed."""
    lost = trial.user_attrs.get("lost", {}).get("reason")
    return str(trial.user_attrs.get("failure") or (f"lost too often: {lost}" if lost else "no reason was recorded"))


def find_best(trials: Sequence[FrozenTrial], objectives: Mapping[str, str]) -> list[FrozenTrial]:
    """Find the trials that no other dominates, the best in the first objective first."""
    signs = [1.0 if direction == "maximize" else -1.0 for direction in objectives.values()]
    worth = [[sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in trials]
    return [trials[i] for i in find_pareto_front(worth)]
