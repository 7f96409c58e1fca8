"""Settings: runs that differ in their seed only, taken together; and the dense twin of each."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from thresher.report.configs import BOOKKEEPING, SPARSE_ONLY, part_of, without
from thresher.report.runs import Run

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "error")
AXES = ("kept", "compute")
NOT_QUALITY = {*AXES, "score", "compute_loss", "aim", "gap", "seconds"}
PREFERRED = ("test/acc", "test/perplexity", "test/bits_per_byte", "test/f1", "test/loss")


class Spread(NamedTuple):
    """Mean and sample standard deviation of a metric over seeds; None of a single one."""

    mean: float
    deviation: float | None
    runs: int


@dataclass
class Setting:
    """Runs of one config, whose seeds differ.

    Attributes:
        runs: At least one; all of them count.
        task: What was to be learnt: only settings of one task are compared.
        identity: The config without seed and bookkeeping.
    """

    runs: list[Run]
    task: str
    identity: tuple[Any, ...]
    _spreads: dict[str, Spread | None] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def mechanism(self) -> str:
        return self.runs[0].mechanism

    def spread(self, metric: str) -> Spread | None:
        """Return mean and deviation of a metric, None unless every run has it."""
        if metric not in self._spreads:
            self._spreads[metric] = _spread([run.metrics.get(metric) for run in self.runs])
        return self._spreads[metric]


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = math.fsum(known) / len(known)
    squares = math.fsum((value - mean) ** 2 for value in known)
    return Spread(mean, math.sqrt(squares / (len(known) - 1)) if len(known) > 1 else None, len(known))


def settings_of(runs: Iterable[Run]) -> list[Setting]:
    """Take runs that differ in their seed only together, in the order of the runs."""
    found: dict[tuple[Any, ...], Setting] = {}
    for run in runs:
        identity = (run.evaluation, without(run.config, *BOOKKEEPING, "seed"))
        found.setdefault(identity, Setting([], task_of(run), identity)).runs.append(run)
    return list(found.values())


def task_of(run: Run) -> str:
    """Name what a run had to learn: its data, their objective, and its kind of task."""
    data, task = (str(run.config.get(f"{group}._target_", "?")).rpartition(".")[2] for group in ("data", "task"))
    objective = run.config.get("data.objective")
    return f"{data}, {_words(task)}" + (f", {objective}" if objective else "")


def _words(name: str) -> str:
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def dense_twins(settings: Sequence[Setting]) -> dict[int, int]:
    """Return, for the place of each setting that has one, the place of the dense setting of the same training."""
    apart = (*BOOKKEEPING, *SPARSE_ONLY, "seed")
    dense: dict[tuple[Any, ...], int] = {}
    for i, setting in enumerate(settings):
        if setting.mechanism == "dense" and not setting.identity[0]:
            dense.setdefault(without(setting.config, *apart), i)
    twins = ((i, dense.get(without(setting.config, *apart))) for i, setting in enumerate(settings))
    return {i: twin for i, twin in twins if twin is not None and twin != i}


def lower_is_better(metric: str) -> bool:
    """Say whether less of a metric is better, by its name."""
    return any(word in metric for word in LOWER_IS_BETTER)


def axis_of(metric: str, axis: str) -> str:
    """Return the name of kept or compute that was measured together with a metric."""
    return f"{metric.partition('/')[0]}/{axis}"


def metrics_of(settings: Iterable[Setting]) -> list[str]:
    """Return the metrics that a front can be drawn of, the most telling first."""
    settings = list(settings)
    names = {name for setting in settings for name in setting.runs[0].metrics}
    names = {n for n in names if n.startswith(("test/", "val/")) and n.partition("/")[2] not in NOT_QUALITY}
    wanted = Counter(str(setting.config.get("optimized_metric")) for setting in settings)
    order = {name: place for place, name in enumerate((*(n for n, _ in wanted.most_common(1)), *PREFERRED))}
    return sorted(names, key=lambda n: (order.get(n, len(order)), not n.startswith("test/"), n))


def differences(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the keys in which settings differ, each with its most common value.

    A key that some settings lack, such as a hyper-parameter of another mechanism, differs only where the others do.
    """
    values: dict[str, Counter[Any]] = {}
    for setting in settings:
        for key, value in setting.config.items():
            values.setdefault(key, Counter())[value] += 1
    aside = (*BOOKKEEPING, "seed")
    varying = {key: count for key, count in values.items() if len(count) > 1 and not part_of(key, *aside)}
    return {key: count.most_common(1)[0][0] for key, count in varying.items()}
