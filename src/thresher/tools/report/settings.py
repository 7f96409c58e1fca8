"""Settings: groups of runs that differ only in their seed. A setting has a task, a dense twin, and mean metrics."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from thresher.results.configs import BOOKKEEPING, SPARSE_ONLY, Items, exclude, is_part_of
from thresher.results.runs import Run

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "error")
AXES = ("kept", "compute")
NOT_QUALITY = {*AXES, "score", "compute_loss", "aim", "gap", "seconds"}
PREFERRED = ("test/perplexity", "test/acc", "test/bits_per_byte", "test/f1", "test/loss")
# Keys of the data that say how a network learns from them, or where a copy lies, not what they are.
LEARNING = (
    *("data.batch_size", "data.workers", "data.limit_train", "data.augment", "data.erase", "data.download"),
    *("data.root", "data.seed", "data.val_fraction"),
)
OWN_FILES = (".ImageFolder", ".TextCorpus")  # data that consist of the files in their root
# Keys of the trainer that say which test data are read.
TEST_DATA = ("trainer.limit_test_batches", "trainer.fast_dev_run")
# Keys that say how long, on which data and from which weights a network trains. Settings that differ in them may share
# a front, but never without a note.
TRAINING = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.limit_train_batches"),
    *("trainer.limit_val_batches", "trainer.overfit_batches"),
    *("data.limit_train", "data.val_fraction", "data.seed", "init_from"),
)
# Keys of the model that say what is mounted into it and how it trains, not what it is.
MOUNTED = (
    *("model.attention", "model.encoder", "model.decoder", "model.cross", "model.where", "model.pretrained"),
    *("model.dropout", "model.drop_path_rate", "model.weight_init"),
)


class Spread(NamedTuple):
    """Mean and sample standard deviation of a metric over seeds; one run has no deviation."""

    mean: float
    deviation: float | None
    runs: int


@dataclass
class Setting:
    """Runs of one config with different seeds.

    Attributes:
        runs: At least one.
        task: Name of data, model and kind of task. Only settings of one task are compared.
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
        """Return mean and deviation of a metric, or None unless every run has it."""
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


def group_runs(runs: Iterable[Run]) -> list[Setting]:
    """Group runs that differ only in their seed, in the order of the runs."""
    runs = list(runs)
    tasks = name_tasks(runs)
    found: dict[tuple[Any, ...], Setting] = {}
    for run, task in zip(runs, tasks, strict=True):
        identity = (run.evaluation, exclude(run.config, *BOOKKEEPING, "seed"))
        found.setdefault(identity, Setting([], task, identity)).runs.append(run)
    return list(found.values())


def name_tasks(runs: Sequence[Run]) -> list[str]:
    """Name the task of each run: data, model and kind of task. Other data, test data or models get another name."""
    problems = [_problem(run) for run in runs]
    named: dict[str, dict[Items, None]] = {}
    for run, problem in zip(runs, problems, strict=True):
        named.setdefault(_name(run.config), {})[problem] = None
    names: dict[tuple[str, Items], str] = {}
    for name, namesakes in named.items():
        shared = set.intersection(*map(set, namesakes))
        for problem in namesakes:
            own = [f"{key}={value}" for key, value in problem if (key, value) not in shared]
            names[name, problem] = f"{name} ({', '.join(own)})" if own else name
    return [names[_name(run.config), problem] for run, problem in zip(runs, problems, strict=True)]


def _problem(run: Run) -> Items:
    """Return the entries of a config that say which data, test data, model and kind of task."""
    own_data = str(run.config.get("data._target_")).endswith(OWN_FILES)
    return tuple(
        (key, value)
        for key, value in sorted(run.config.items(), key=lambda item: item[0])
        if key == "task._target_"
        or (key in TEST_DATA and value)
        or (is_part_of(key, "data") and (not is_part_of(key, *LEARNING) or (own_data and key == "data.root")))
        or (is_part_of(key, "model") and not is_part_of(key, *MOUNTED))
    )


def _name(config: dict[str, Any]) -> str:
    """Name a task by its data, model, kind and, where there is one, objective."""
    data, model, task = (str(config.get(f"{g}._target_", "?")).rpartition(".")[2] for g in ("data", "model", "task"))
    called = config.get("model.name") or str(config.get("model.name_or_path") or model).rstrip("/").rpartition("/")[2]
    objective = config.get("data.objective")
    return f"{data}, {called}, {_split_words(task)}" + (f", {objective}" if objective else "")


def _split_words(name: str) -> str:
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def find_dense_twins(settings: Sequence[Setting]) -> dict[int, int]:
    """Find the dense twin of each setting: the dense setting of the same training. Both are places in `settings`."""
    ignored = (*BOOKKEEPING, *SPARSE_ONLY, "seed")
    dense: dict[tuple[Any, ...], int] = {}
    for i, setting in enumerate(settings):
        if setting.mechanism == "dense" and not setting.evaluation:
            dense.setdefault(exclude(setting.config, *ignored), i)
    twins = ((i, dense.get(exclude(setting.config, *ignored))) for i, setting in enumerate(settings))
    return {i: twin for i, twin in twins if twin is not None and twin != i}


def lower_is_better(metric: str) -> bool:
    """Tell by the name of a metric whether less of it is better."""
    return any(word in metric for word in LOWER_IS_BETTER)


def name_axis(metric: str, axis: str) -> str:
    """Name the `kept` or `compute` that belongs to a metric: test/kept for test/acc."""
    return f"{metric.partition('/')[0]}/{axis}"


def rank_metrics(settings: Iterable[Setting]) -> list[str]:
    """Rank the metrics that can have a front, the most informative first."""
    settings = list(settings)
    names = {name for setting in settings for name in setting.runs[0].metrics}
    names = {n for n in names if n.startswith(("test/", "val/")) and n.partition("/")[2] not in NOT_QUALITY}
    wanted = Counter(str(setting.config.get("optimized_metric")) for setting in settings)
    if "test/perplexity" in names:
        del wanted["test/acc"]  # the default of every config; language models are judged by perplexity
    first = dict.fromkeys([*(name for name, _ in wanted.most_common(1)), *PREFERRED])
    order = {name: place for place, name in enumerate(first)}
    return sorted(names, key=lambda n: (order.get(n, len(order)), not n.startswith("test/"), n))


def find_differences(settings: Sequence[Setting]) -> dict[str, Any]:
    """Find the keys in which settings differ, each with its most common value.

    A key that some settings lack, such as a hyper-parameter of another mechanism, counts only among those that have it.
    """
    values: dict[str, Counter[Any]] = {}
    for setting in settings:
        for key, value in setting.config.items():
            values.setdefault(key, Counter())[value] += 1
    ignored = (*BOOKKEEPING, "seed")
    varying = {key: count for key, count in values.items() if len(count) > 1 and not is_part_of(key, *ignored)}
    return {key: count.most_common(1)[0][0] for key, count in varying.items()}


def find_training_differences(settings: Iterable[Setting]) -> dict[str, list[Any]]:
    """Find the keys of training length, data and initial weights in which settings differ, with all their values."""
    settings = list(settings)
    values = {key: list(dict.fromkeys(s.config.get(key) for s in settings)) for key in TRAINING}
    return {key: found for key, found in values.items() if len(found) > 1}
