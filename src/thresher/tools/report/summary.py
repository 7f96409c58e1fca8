"""The content of a report, whatever its form: settings by task, their fronts, and the runs without results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thresher.results.commands import CommandWriter
from thresher.results.configs import SPARSE_ONLY, is_part_of
from thresher.results.pareto import find_pareto_front
from thresher.results.runs import Run, find_runs, read_run
from thresher.tools.report.settings import (
    AXES,
    Setting,
    find_dense_twins,
    find_differences,
    find_training_differences,
    group_runs,
    lower_is_better,
    name_axis,
    rank_metrics,
)

MOST = 4  # values of a key that a note names


@dataclass(frozen=True)
class Front:
    """Settings that no other of their task dominates, by place in the summary, cheapest first."""

    task: str
    metric: str
    axis: str
    places: list[int]


@dataclass
class Summary:
    """The results of some runs.

    Attributes:
        runs: All runs, failed, stopped and running ones included.
        commands: The command that repeats each run, in their order; empty where it is not known.
    """

    runs: list[Run]
    commands: list[str]

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings of the runs that have usable results."""
        return group_runs(run for run in self.runs if not run.problem)

    @cached_property
    def failed(self) -> list[Run]:
        """Runs that ended without usable results, of themselves."""
        return [run for run in self.runs if run.status == "failed"]

    @cached_property
    def stopped(self) -> list[Run]:
        """Runs that a signal stopped before they had results."""
        return [run for run in self.runs if run.status == "stopped"]

    @cached_property
    def running(self) -> list[Run]:
        """Runs that are not finished, and still write."""
        return [run for run in self.runs if run.status == "running"]

    @cached_property
    def columns(self) -> dict[str, dict[str, Any]]:
        """The keys in which the settings of a task differ, with the most common value of each, by task."""
        return {task: find_differences([s for s in self.settings if s.task == task]) for task in self.tasks}

    @cached_property
    def training_differences(self) -> dict[str, dict[str, list[Any]]]:
        """The keys of training length, data and initial weights in which the settings of a task differ, by task."""
        return {task: find_training_differences(s for s in self.settings if s.task == task) for task in self.tasks}

    def find_columns(self, setting: Setting) -> dict[str, Any]:
        """Find the keys in which settings of the same task and mechanism differ, with the most common value of each."""
        return self._columns_by_kind[_kind_of(setting)]

    @cached_property
    def _columns_by_kind(self) -> dict[tuple[str, str, bool], dict[str, Any]]:
        by_kind: dict[tuple[str, str, bool], list[Setting]] = {}
        for setting in self.settings:
            by_kind.setdefault(_kind_of(setting), []).append(setting)
        return {kind: find_differences(settings) for kind, settings in by_kind.items()}

    @cached_property
    def twins(self) -> dict[int, int]:
        """The dense twin of each setting that has one, both by place."""
        return find_dense_twins(self.settings)

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """The metrics of each task, the task with the most settings first."""
        by_task: dict[str, list[Setting]] = {}
        for setting in self.settings:
            by_task.setdefault(setting.task, []).append(setting)
        return {task: rank_metrics(own) for task, own in sorted(by_task.items(), key=lambda item: -len(item[1]))}

    @cached_property
    def fronts(self) -> list[Front]:
        """The front of every task, metric and axis."""
        wanted = ((task, m, axis) for task, metrics in self.tasks.items() for m in metrics for axis in AXES)
        return [Front(*key, self._front(*key)) for key in wanted]

    def _front(self, task: str, metric: str, axis: str) -> list[int]:
        places, worth = [], []
        for i, setting in enumerate(self.settings):
            if setting.task == task:
                cost, value = setting.spread(name_axis(metric, axis)), setting.spread(metric)
                if cost is not None and value is not None:
                    places.append(i)
                    worth.append((-cost.mean, -value.mean if lower_is_better(metric) else value.mean))
        return [places[i] for i in find_pareto_front(worth)]

    def command(self, run: Run) -> str:
        """Return the command that repeats a run."""
        return self._by_run.get(id(run), "")

    @cached_property
    def _by_run(self) -> dict[int, str]:
        return {id(run): command for run, command in zip(self.runs, self.commands, strict=True)}

    @cached_property
    def front_axes(self) -> dict[str, dict[int, str]]:
        """By task, the settings on a front of its first metric, with the axes of these fronts: `kept + compute`."""
        found: dict[str, dict[int, str]] = {task: {} for task in self.tasks}
        for front in self.fronts:
            if front.metric == self.tasks[front.task][0]:
                for place in front.places:
                    before = found[front.task].get(place)
                    found[front.task][place] = f"{before} + {front.axis}" if before else front.axis
        return found


def summarise(
    roots: Sequence[Path], conf: Path | None, track: Callable[[Iterable[Any], str], Iterable[Any]]
) -> Summary:
    """Read all runs in and below some folders.

    Args:
        roots: The folders.
        conf: Folder of the configs that commands refer to; None leaves commands out.
        track: Shows the progress of an iteration under a title.

    Raises:
        FileNotFoundError: One of them is not a folder.
    """
    runs = [read_run(*found) for found in track(find_runs(roots), "reading runs")]
    writer = CommandWriter(conf) if conf else None
    return Summary(runs, [writer.write(run) if writer else "" for run in track(runs, "writing commands")])


def describe_training_differences(summary: Summary, task: str) -> str:
    """Find in which keys of training length and data the settings of a task differ; nothing where in none."""
    found = [
        f"{key} ({', '.join(format_value(key, value) for value in values[:MOST])}{', ...' * (len(values) > MOST)})"
        for key, values in summary.training_differences[task].items()
    ]
    if not found:
        return ""
    return f"Settings of this task were not all trained alike; they differ in {', '.join(found)}."


def format_value(key: str, value: Any) -> str:
    """Format a value of a config; a `_target_` by its last name."""
    if key == "attention._target_":
        return str(value).split(".")[-2]
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(format_value(key, child) for child in value)}]"
    return f"{value:g}" if isinstance(value, float) and f"{value:g}" == repr(value) else str(value)


def format_key(key: str) -> str:
    """Format a key of a config."""
    return key.removesuffix("._target_")


def describe_setting(summary: Summary, setting: Setting) -> str:
    """Describe a setting by its mechanism and by how it differs from others of that mechanism.

    Numbers that differ among them are always named, words and switches where they are not the most common ones.
    """
    ignored = SPARSE_ONLY if setting.mechanism == "dense" else ("attention._target_",)
    others = [
        f"{format_key(key)}={format_value(key, value)}"
        for key, common in summary.find_columns(setting).items()
        if not is_part_of(key, *ignored) and ((value := setting.config.get(key, common)) != common or _is_number(value))
    ]
    name = "evaluated " + setting.mechanism if setting.evaluation else setting.mechanism
    return f"{name}  {' '.join(others)}".strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind_of(setting: Setting) -> tuple[str, str, bool]:
    return setting.task, setting.mechanism, setting.evaluation
