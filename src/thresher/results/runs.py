"""Read runs from their folders: config, metrics and end of each."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from thresher.results.configs import exclude, read_config
from thresher.results.outcome import OUTPUT, read_exit_code, read_last_lines

CONTINUED = re.compile(r"config_(\d+)\.yaml$")
PREFIX = re.compile(r"^(\[[^\]]*\])+ - ")  # of a line in train.log: time, logger, level
LOGS = (OUTPUT, "train.log")  # the output of a sweep's trial holds more than its log
EXCERPT = 12  # lines
RECENT = 600.0  # seconds: a run without an exit code that wrote something since then counts as running
NO_CONFIG, NO_METRICS = "ended before it had a config", "no metrics.json: not finished"
NO_TEST = "trained, but its test is not finished"
UNFINISHED = (NO_CONFIG, NO_METRICS, NO_TEST)
SKIPPED = {"checkpoints", "csv", "tensorboard", "wandb", "__pycache__"}
_SIGNALS = {number.value: number.name for number in signal.Signals}
_STOPS = ("SIGINT", "SIGTERM", "SIGUSR1")  # those at which a training stops in order
TROUBLE = re.compile(r"error|exception|traceback|killed|sigterm|out of memory|cannot|no space", re.IGNORECASE)


@dataclass
class Run:
    """One run.

    Attributes:
        folder: Where it lies.
        name: Its folder, relative to the folder that was searched.
        config: Dotted keys and values; empty where the run ended before it wrote its config.
        metrics: Name and value; None for a value that is not finite.
        problem: Why it has no usable results; empty where it has.
        running: Whether it is not finished: it has no exit code and wrote something in the last minutes.
        stopped: Whether a user or a scheduler stopped it by a signal; the same command resumes it.
        excerpt: The last lines that it printed or logged; of runs with a problem only.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    problem: str = ""
    running: bool = False
    stopped: bool = False
    excerpt: str = ""

    @property
    def status(self) -> str:
        """In one word, how far it is."""
        ended = "stopped" if self.stopped else "failed" if self.problem else "finished"
        return "running" if self.running else ended

    @property
    def evaluation(self) -> bool:
        """Whether eval.py wrote it: a checkpoint was tested, nothing trained."""
        return bool(self.metrics) and "train/seconds" not in self.metrics

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that an evaluation tested, if it is known."""
        if not self.config.get("train", True) and self.config.get("ckpt_path"):
            return Path(str(self.config["ckpt_path"]))
        return self.folder.parent.parent / "checkpoints" / "best.ckpt" if self.folder.parent.name == "eval" else None

    @property
    def mechanism(self) -> str:
        """The name of its attention."""
        return str(self.config.get("attention._target_", "?")).split(".")[-2 if self.config else -1]


def find_runs(roots: Sequence[Path]) -> list[tuple[Path, str]]:
    """Find the folders of runs in and below some folders, each once, with the name to show.

    Raises:
        FileNotFoundError: One of them is not a folder.
    """
    found: dict[Path, str] = {}
    for root in roots:
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; name one that holds runs, as train.py writes them")
        for folder in _find_run_folders(root):
            inside = folder.relative_to(root).as_posix()
            name = inside if len(roots) == 1 else f"{root.as_posix()}/{inside}"
            found.setdefault(folder.resolve(), root.resolve().name if inside == "." else name)
    return list(found.items())


def _find_run_folders(root: Path) -> Iterator[Path]:
    """Yield folders with a config, and folders with only a log and no run inside: runs that ended early."""
    begun: list[Path] = []
    configured: list[Path] = []
    for path, files in _walk(root):
        if "config.yaml" in files:
            configured.append(path)
        elif not set(LOGS).isdisjoint(files):
            begun.append(path)
    above = {parent for path in configured for parent in path.parents}
    yield from sorted([*configured, *(path for path in begun if path not in above)])


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and the names of their files, each folder once, under its own name before links to it."""
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        start, waiting = waiting[0], waiting[1:]
        for path, folders, files in os.walk(start):
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
            waiting += [Path(path, name) for name in folders if os.path.islink(os.path.join(path, name))]
            yield Path(path), files


def read_run(folder: Path, name: str) -> Run:
    """Read one run; `Run.problem` says what is missing or broken."""
    run = Run(folder, name)
    try:
        run.config = read_config(_find_newest_config(folder).read_text())
        run.metrics = _read_metrics(folder)
        if run.evaluation:
            run.config = dict(exclude(run.config, "callbacks"))  # those of the training
        run.problem = _find_problem(run)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        run.problem = NO_CONFIG if missing == "config.yaml" else NO_METRICS
    except (ValueError, OSError) as error:
        run.problem = str(error)
    if run.problem:
        _describe_ending(run)
    return run


def _find_newest_config(folder: Path) -> Path:
    continued = [(int(m.group(1)), path) for path in folder.glob("config_*.yaml") if (m := CONTINUED.search(path.name))]
    return max(continued)[1] if continued else folder / "config.yaml"


def _read_metrics(folder: Path) -> dict[str, float | None]:
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except ValueError as error:
        raise ValueError(f"metrics.json cannot be read: {error}") from error
    if not isinstance(metrics, dict) or not all(isinstance(v, (int, float)) or v is None for v in metrics.values()):
        raise ValueError("metrics.json cannot be read: it is not a table of names and numbers")
    return {str(k): float(v) if v is not None and math.isfinite(v) else None for k, v in metrics.items()}


def _find_problem(run: Run) -> str:
    if run.config.get("test", True) and not any(name.startswith("test/") for name in run.metrics):
        return NO_TEST
    broken = [name for name, value in run.metrics.items() if value is None and name.startswith(("test/", "val/"))]
    return f"not a finite number: {', '.join(broken)}" if broken else ""


def _describe_ending(run: Run) -> None:
    """Describe whether a run without results still runs, or why it ended, with its last lines."""
    code = read_exit_code(run.folder)
    if code:
        name = _SIGNALS.get(code - 128)
        run.stopped = name in _STOPS
        run.problem = f"exit code {code}" if name is None else f"stopped by {name}"
    tails = (read_last_lines(run.folder / log, EXCERPT) for log in LOGS)
    lines = [line[:400] for line in next(filter(None, tails), [])]
    run.excerpt = "\n".join(lines)
    messages = [line for line in lines if "HYDRA_FULL_ERROR" not in line]
    errors = [line for line in messages if TROUBLE.search(line)]
    files = [run.folder, *run.folder.glob("*.*"), *run.folder.glob("csv/*/*.csv"), *run.folder.glob("checkpoints/*")]
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=0)
    ended = code is not None or not run.problem.startswith(UNFINISHED) or messages[-1:] == errors[-1:] != []
    run.running = not ended and time.time() - newest < RECENT
    if run.running:
        run.problem = "still running"
    elif errors:
        said = PREFIX.sub("", errors[-1]).strip()[:300]
        run.problem = said if said.startswith(run.problem) else f"{run.problem}: {said}"
        return
    run.problem += f", last written {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
