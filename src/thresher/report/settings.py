"""Settings: runs that differ in their seed only, taken together; and the dense twin of each."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from thresher.report.configs import BOOKKEEPING, SPARSE_ONLY, Items, part_of, without
from thresher.report.runs import Run

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "error")
AXES = ("kept", "compute")
NOT_QUALITY = {*AXES, "score", "compute_loss", "aim", "gap", "seconds"}
PREFERRED = ("test/perplexity", "test/acc", "test/bits_per_byte", "test/f1", "test/loss")
# Of the data, how they are learnt from or where a copy lies; not what they are.
LEARNING = (
    *("data.batch_size", "data.workers", "data.limit_train", "data.augment", "data.erase", "data.download"),
    *("data.root", "data.seed", "data.val_fraction"),
)
OWN_FILES = (".ImageFolder", ".TextCorpus")  # data that are what lies in their root
# Of the model, what is put into it and how it is trained; not what it is.
MOUNTED = (
    *("model.attention", "model.encoder", "model.decoder", "model.cross", "model.where", "model.pretrained"),
    *("model.dropout", "model.drop_path_rate", "model.weight_init"),
)


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
        task: What was to be learnt from which data by which model: only settings of one task are compared.
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

    @property
    def evaluation(self) -> bool:
        return self.runs[0].evaluation

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
    runs = list(runs)
    tasks = tasks_of(runs)
    found: dict[tuple[Any, ...], Setting] = {}
    for run, task in zip(runs, tasks, strict=True):
        identity = (run.evaluation, without(run.config, *BOOKKEEPING, "seed"))
        found.setdefault(identity, Setting([], task, identity)).runs.append(run)
    return list(found.values())


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Name what each run had to learn, from which data, by which model; other data or another model: another name."""
    problems = [_problem(run) for run in runs]
    named: dict[str, dict[Items, None]] = {}
    for run, problem in zip(runs, problems, strict=True):
        named.setdefault(_name(run.config), {})[problem] = None
    names: dict[tuple[str, Items], str] = {}
    for name, alike in named.items():
        shared = set.intersection(*map(set, alike))
        for problem in alike:
            apart = [f"{key}={value}" for key, value in problem if (key, value) not in shared]
            names[name, problem] = f"{name} ({', '.join(apart)})" if apart else name
    return [names[_name(run.config), problem] for run, problem in zip(runs, problems, strict=True)]


def _problem(run: Run) -> Items:
    """Return the entries of a config that say which data, which model and which kind of task."""
    own_data = str(run.config.get("data._target_")).endswith(OWN_FILES)
    return tuple(
        (key, value)
        for key, value in sorted(run.config.items(), key=lambda item: item[0])
        if key == "task._target_"
        or (part_of(key, "data") and (not part_of(key, *LEARNING) or (own_data and key == "data.root")))
        or (part_of(key, "model") and not part_of(key, *MOUNTED))
    )


def _name(config: dict[str, Any]) -> str:
    """Name data, model and task by what they are called, and the objective where there is one."""
    data, model, task = (str(config.get(f"{g}._target_", "?")).rpartition(".")[2] for g in ("data", "model", "task"))
    called = config.get("model.name") or str(config.get("model.name_or_path") or model).rstrip("/").rpartition("/")[2]
    objective = config.get("data.objective")
    return f"{data}, {called}, {_words(task)}" + (f", {objective}" if objective else "")


def _words(name: str) -> str:
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def dense_twins(settings: Sequence[Setting]) -> dict[int, int]:
    """Return, for the place of each setting that has one, the place of the dense setting of the same training."""
    apart = (*BOOKKEEPING, *SPARSE_ONLY, "seed")
    dense: dict[tuple[Any, ...], int] = {}
    for i, setting in enumerate(settings):
        if setting.mechanism == "dense" and not setting.evaluation:
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
    if "test/perplexity" in names:
        del wanted["test/acc"]  # what every config optimises unless told otherwise; of language models, perplexity
    first = dict.fromkeys([*(name for name, _ in wanted.most_common(1)), *PREFERRED])
    order = {name: place for place, name in enumerate(first)}
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
