"""Text classification: classification with macro-F1 beside accuracy, and weights for classes of unlike size."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score

from thresher.tasks.base import Step
from thresher.tasks.classification import Classification

ClassWeights = Literal["none", "balanced"]


class TextClassification(Classification):
    """Trains a network that maps token ids to one logit for each class; batches are (ids, labels).

    Args:
        num_classes: Number of classes.
        class_counts: How often each class occurs in training.
        class_weights: "balanced" weighs training examples by the inverse frequency of their class, "none" alike.
        label_smoothing: Share of the target's mass that is spread over all classes in training.
        **task: See `Task`.

    Raises:
        ValueError: A value out of range.
    """

    weights: Tensor | None

    def __init__(
        self,
        *args: Any,
        num_classes: int,
        class_counts: Sequence[int],
        class_weights: ClassWeights = "none",
        label_smoothing: float = 0.0,
        **task: Any,
    ) -> None:
        super().__init__(*args, num_classes=num_classes, label_smoothing=label_smoothing, **task)
        if class_weights not in get_args(ClassWeights):
            raise ValueError(
                f"task.class_weights must be one of {', '.join(get_args(ClassWeights))}; got {class_weights!r}"
            )
        counts = torch.tensor([float(count) for count in class_counts]).clamp_min(1)
        balanced = counts.sum() / (num_classes * counts)
        self.register_buffer("weights", balanced if class_weights == "balanced" else None, persistent=False)

    def step(self, batch: tuple[Tensor, Tensor]) -> Step:
        step = super().step(batch)
        if self.weights is None or not self.training:
            return step
        loss = F.cross_entropy(
            step.predictions.float(), step.targets, weight=self.weights, label_smoothing=self.label_smoothing
        )
        return step._replace(loss=loss)

    def build_metrics(self, stage: str) -> dict[str, Metric]:
        return super().build_metrics(stage) | {"f1": MulticlassF1Score(self.num_classes, average="macro")}
