"""All that a report says, before it takes a form: settings by task, their fronts, and what failed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thresher.pareto import pareto_front
from thresher.report.commands import Commands
from thresher.report.configs import SPARSE_ONLY, part_of
from thresher.report.runs import Run, find_runs, read_run
from thresher.report.settings import (
    AXES,
    Setting,
    axis_of,
    dense_twins,
    differences,
    lower_is_better,
    metrics_of,
    settings_of,
)


@dataclass(frozen=True)
class Front:
    """Settings that nothing else of their task beats, by place in the summary, cheapest first."""

    task: str
    metric: str
    axis: str
    places: list[int]


@dataclass
class Summary:
    """What a folder of runs gave.

    Attributes:
        runs: All of them.
        commands: What repeats each run, in their order; empty where that is not known.
    """

    runs: list[Run]
    commands: list[str]

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings of the runs that count."""
        return settings_of(run for run in self.runs if not run.problem)

    @cached_property
    def failed(self) -> list[Run]:
        """Runs that count for nothing, and never will."""
        return [run for run in self.runs if run.problem and not run.running]

    @cached_property
    def running(self) -> list[Run]:
        """Runs that are not finished."""
        return [run for run in self.runs if run.running]

    @cached_property
    def columns(self) -> dict[str, dict[str, Any]]:
        """By task, the keys in which its settings differ, with the most common value of each."""
        return {task: differences([s for s in self.settings if s.task == task]) for task in self.tasks}

    def columns_of(self, setting: Setting) -> dict[str, Any]:
        """Return the keys in which a setting differs from others of its task and mechanism, with their most common."""
        return self._columns_by_kind[_kind(setting)]

    @cached_property
    def _columns_by_kind(self) -> dict[tuple[str, str, bool], dict[str, Any]]:
        alike: dict[tuple[str, str, bool], list[Setting]] = {}
        for setting in self.settings:
            alike.setdefault(_kind(setting), []).append(setting)
        return {kind: differences(settings) for kind, settings in alike.items()}

    @cached_property
    def twins(self) -> dict[int, int]:
        """The dense setting of the same training, for each setting that has one."""
        return dense_twins(self.settings)

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """Tasks, the one with the most runs first, with the metrics that were measured."""
        by_task: dict[str, list[Setting]] = {}
        for setting in self.settings:
            by_task.setdefault(setting.task, []).append(setting)
        return {task: metrics_of(own) for task, own in sorted(by_task.items(), key=lambda item: -len(item[1]))}

    @cached_property
    def fronts(self) -> list[Front]:
        """The fronts of every task, metric and axis."""
        wanted = ((task, m, axis) for task, metrics in self.tasks.items() for m in metrics for axis in AXES)
        return [Front(*key, self._front(*key)) for key in wanted]

    def _front(self, task: str, metric: str, axis: str) -> list[int]:
        places, worth = [], []
        for i, setting in enumerate(self.settings):
            if setting.task == task:
                cost, value = setting.spread(axis_of(metric, axis)), setting.spread(metric)
                if cost is not None and value is not None:
                    places.append(i)
                    worth.append((-cost.mean, -value.mean if lower_is_better(metric) else value.mean))
        return [places[i] for i in pareto_front(worth)]

    def command(self, run: Run) -> str:
        """Return what repeats a run."""
        return self._by_run.get(id(run), "")

    @cached_property
    def _by_run(self) -> dict[int, str]:
        return {id(run): command for run, command in zip(self.runs, self.commands, strict=True)}

    @cached_property
    def on_a_front(self) -> dict[str, dict[int, str]]:
        """By task, the settings on the fronts of its first metric, with the axes: `kept`, `compute` or both."""
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
        conf: The folder of configs that commands refer to; None leaves commands out.
        track: Shows progress over something, under a title.

    Raises:
        FileNotFoundError: One of them is not a folder.
    """
    runs = [read_run(*found) for found in track(find_runs(roots), "reading runs")]
    commands = Commands(conf) if conf else None
    return Summary(runs, [commands.of(run) if commands else "" for run in track(runs, "writing commands")])


def shown(key: str, value: Any) -> str:
    """Return how a value of the config is shown: a target by its own name."""
    if key == "attention._target_":
        return str(value).split(".")[-2]
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(shown(key, child) for child in value)}]"
    return f"{value:g}" if isinstance(value, float) and f"{value:g}" == repr(value) else str(value)


def key_label(key: str) -> str:
    """Return how a key of the config is shown."""
    return key.removesuffix("._target_")


def difference(summary: Summary, setting: Setting) -> str:
    """Describe a setting by its mechanism and by what tells it from others of that mechanism.

    Numbers that differ among them are always named, words and switches where they are not those of most.
    """
    idle = SPARSE_ONLY if setting.mechanism == "dense" else ("attention._target_",)
    others = [
        f"{key_label(key)}={shown(key, value)}"
        for key, common in summary.columns_of(setting).items()
        if not part_of(key, *idle) and ((value := setting.config.get(key, common)) != common or _is_number(value))
    ]
    name = "evaluated " + setting.mechanism if setting.evaluation else setting.mechanism
    return f"{name}  {' '.join(others)}".strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(setting: Setting) -> tuple[str, str, bool]:
    return setting.task, setting.mechanism, setting.evaluation
