"""Classification: cross entropy, accuracy, and top-5 accuracy if there are many classes."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from thresher.attention.options import check_number
from thresher.tasks.base import Step, Task

TOP5_FROM = 20  # least number of classes


class Classification(Task):
    """Trains a network that maps an input to one logit for each class; batches are (inputs, labels).

    Args:
        num_classes: Number of classes.
        label_smoothing: Share of the target's mass that is spread over all classes in training.
        **task: See `Task`.

    Raises:
        ValueError: A value out of range.
    """

    metric = "acc"

    def __init__(self, *args: Any, num_classes: int, label_smoothing: float = 0.0, **task: Any) -> None:
        if num_classes < 2:
            raise ValueError(f"classification needs at least two classes, got {num_classes}")
        check_number("task.label_smoothing", label_smoothing, least=0.0, below=1.0)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        super().__init__(*args, **task)

    def step(self, batch: tuple[Tensor, Tensor]) -> Step:
        inputs, labels = batch
        logits = self.net(inputs)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        return Step(loss, len(labels), logits, labels)

    def training_metrics(self, step: Step) -> dict[str, Tensor]:
        return {"acc": (step.predictions.argmax(-1) == step.targets).float().mean()}

    def build_metrics(self, stage: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"acc": MulticlassAccuracy(self.num_classes, average="micro")}
        if self.num_classes >= TOP5_FROM:
            metrics["top5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5)
        return metrics
