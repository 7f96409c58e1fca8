"""Tuning: a frozen network under sparse attention, compared with itself under dense attention."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import CosineSimilarity, MeanMetric, Metric

from thresher.attention.mechanism import dense_attention
from thresher.attention.options import check_choice, check_flags, check_integer, check_number
from thresher.attention.shared.thresholds import Unit
from thresher.budget.objectives import measure_error
from thresher.budget.ratio import ComputeRatio
from thresher.budget.starts import check_units
from thresher.budget.tuning_state import STARTS, Start
from thresher.tasks.base import Step, Task
from thresher.tasks.classification import Classification
from thresher.tasks.language_modeling import LanguageModeling
from thresher.tasks.text_classification import TextClassification


class Compared(NamedTuple):
    """What a network makes of a batch.

    Attributes:
        output: What is compared with the dense network.
        step: The loss and the predictions; without labels predictions alone count.
    """

    output: Tensor
    step: Step


class Tuning(Task):
    """Tunes the thresholds and tail factors of a frozen network against its own dense output.

    `thresher.run.tune` tunes, by `thresher.tune`. This class says what is compared, and evaluates: `error` against the
    dense network, and the metrics of the data's own task (accuracy, perplexity) under sparse attention and, with the
    prefix `dense_`, under dense attention.

    Args:
        labels: Whether the network predicts the labels of the data. Otherwise it is built without a head for them, its
            output alone is compared, and `cosine` is the mean cosine of the two outputs.
        objective: "kl" compares logits, "error" is a relative squared error; "auto" is "kl" with labels, unless
            `output` names a module.
        output: Name of the module in the network whose output is compared, such as the model under a pooling; by
            default the output of the network. Tokens that its `attention_mask` hides do not count.
        steps: Steps of the tuning, of one batch each; 0 only calibrates, from the better start.
        lr: Learning rate of thresholds; None chooses one by their unit.
        evaluate_every: Steps between two evaluations on the held-out batches.
        starts: The starts to calibrate from, see `thresher.tune`.
        units: The units of thresholds to calibrate in, see `thresher.tune`; None is the one that they have.
        batches: Batches of the training data to tune on, used in turn.
        held_out: Batches of the validation data to choose the best step by, and to settle on.
        auxiliary: Weights of auxiliary losses by name; those left out have the weight that their mechanism states.
        num_classes: See `Classification`.
        class_counts: See `TextClassification`.
        vocabulary: See `LanguageModeling`.
        bytes_per_token: See `LanguageModeling`.
        **task: See `Task`.

    Raises:
        ValueError: A value out of range, or a module that the network lacks.
    """

    metric = "error"

    def __init__(
        self,
        net: nn.Module,
        *,
        labels: bool = True,
        objective: Literal["auto", "error", "kl"] = "auto",
        output: str | None = None,
        steps: int = 90,
        lr: float | None = None,
        evaluate_every: int = 30,
        starts: Sequence[Start] = STARTS,
        units: Sequence[Unit] | None = None,
        batches: int = 32,
        held_out: int = 6,
        auxiliary: Mapping[str, float] = MappingProxyType({}),
        num_classes: int | None = None,
        class_counts: Sequence[int] | None = None,
        vocabulary: int | None = None,
        bytes_per_token: Mapping[str, float] | None = None,
        **task: Any,
    ) -> None:
        check_flags(**{"task.labels": labels})
        check_choice("task.objective", objective, ("auto", "error", "kl"))
        check_integer("task.steps", steps, 0)
        for name, value in (("evaluate_every", evaluate_every), ("batches", batches), ("held_out", held_out)):
            check_integer(f"task.{name}", value, 1)
        for start in starts:
            check_choice("task.starts", start, STARTS)
        check_units("task.units", units)
        if task.get("distill"):
            raise ValueError("task.distill has no effect with task=tuning, which learns from the dense output alone")
        if lr is not None:  # None chooses by the unit of thresholds
            check_number("task.lr", lr, above=0.0)
        if output is not None and output not in dict(net.named_modules()):
            close = ", ".join(name for name, _ in net.named_children())
            raise ValueError(f"task.output={output}: the network has no such module; it has {close}, ...")
        self.labels, self.output = labels, output
        logits = labels and output is None
        self.objective: Literal["error", "kl"] = ("kl" if logits else "error") if objective == "auto" else objective
        self.steps, self.lr, self.evaluate_every = steps, lr, evaluate_every
        self.starts, self.batches, self.held_out = tuple(starts), batches, held_out
        self.units = None if units is None else tuple(units)
        own: dict[str, Any] = {"num_classes": num_classes, "class_counts": class_counts}
        own |= {"vocabulary": vocabulary, "bytes_per_token": bytes_per_token}
        given = {name: value for name, value in own.items() if value is not None}
        judge = _build_judge(net, given, task) if labels else None
        self._judges = () if judge is None else (judge,)  # in a tuple, so that its network is not registered twice
        super().__init__(net, auxiliary=auxiliary, **task)

    def step(self, batch: Any) -> Step:
        for judge in self._judges:
            return judge.step(batch)
        inputs = batch[0]
        predictions = self.net(*inputs) if isinstance(inputs, tuple | list) else self.net(inputs)
        return Step(predictions.new_zeros(()), len(predictions), predictions, predictions)

    def compare(self, batch: Any) -> Compared:
        """Run the network on a batch, and take what is compared."""
        if self.output is None:
            step = self.step(batch)
            return Compared(step.predictions, step)
        with _read_output(self.net.get_submodule(self.output)) as outputs:
            step = self.step(batch)
        if not outputs:
            raise ValueError(f"task.output={self.output}: the network did not run this module; name one that it runs")
        return Compared(outputs[-1], step)

    def weight(self, step: Step) -> float | Tensor:
        return next((judge.weight(step) for judge in self._judges), step.size)

    def measure_error(self, found: Compared, wanted: Compared) -> Tensor:
        """Measure how far an output is from the dense one."""
        return measure_error(found.output, wanted.output, None, self.objective)

    def build_metrics(self, stage: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {} if self._judges else {"cosine": CosineSimilarity(reduction="mean")}
        for judge in self._judges:
            for prefix in ("", "dense_"):
                own = {"loss": MeanMetric(), **judge.build_metrics(stage)}
                metrics |= {f"{prefix}{name}": metric for name, metric in own.items()}
        return metrics

    def _build_all_metrics(self, stage: str) -> nn.ModuleDict:
        shared: dict[str, Metric] = {
            "error": MeanMetric(),
            "kept": ComputeRatio("kept"),
            "compute": ComputeRatio("macs"),
        }
        return nn.ModuleDict(shared | self.build_metrics(stage))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ValueError("task=tuning trains no weights in an epoch: python train.py task=tuning tunes before its test")

    @torch.no_grad()
    def _evaluate(self, stage: str, batch: Any) -> None:
        with dense_attention():
            wanted = self.compare(batch)
        with self.meter:
            found = self.compare(batch)
        metrics: dict[str, Any] = dict(self.evaluation[stage].items())  # type: ignore[operator]
        for name, metric in metrics.items():
            step = (wanted if name.startswith("dense_") else found).step
            if name == "error":
                metric.update(self.measure_error(found, wanted), weight=step.size)
            elif name == "cosine":
                metric.update(found.step.predictions.flatten(0, -2), wanted.step.predictions.flatten(0, -2))
            elif isinstance(metric, ComputeRatio):
                metric.update(self.meter.costs())
            elif isinstance(metric, MeanMetric):
                metric.update(step.loss, weight=self.weight(step))
            else:
                metric.update(step.predictions, step.targets)
            self.log(f"{stage}/{name}", metric, batch_size=step.size)

    def on_validation_epoch_end(self) -> None:
        """Log no score: checkpoints are chosen by the tuning itself."""


def _build_judge(net: nn.Module, arguments: Mapping[str, Any], task: Mapping[str, Any]) -> Task:
    """Build the task of the data, by the arguments that the data have for it."""
    kinds: dict[str, type[Task]] = {
        "vocabulary": LanguageModeling,
        "class_counts": TextClassification,
        "num_classes": Classification,
    }
    kind = next((kind for name, kind in kinds.items() if name in arguments), None)
    if kind is None:
        raise ValueError("task=tuning finds no labels in these data: set task.labels=false")
    return kind(net, **arguments, **task).eval()


@contextmanager
def _read_output(module: nn.Module) -> Any:
    """Read the outputs of a module, without the tokens that its `attention_mask` hides."""
    outputs: list[Tensor] = []

    def read(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        states = getattr(output, "last_hidden_state", output)
        states = states[0] if isinstance(states, tuple | list) else states
        mask = kwargs.get("attention_mask")
        outputs.append(states if mask is None or mask.shape != states.shape[:2] else states[mask.bool()])

    handle = module.register_forward_hook(read, with_kwargs=True)
    try:
        yield outputs
    finally:
        handle.remove()
