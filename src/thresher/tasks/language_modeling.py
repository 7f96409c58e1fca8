"""Language modelling: causal, masked and sequence to sequence; perplexity, and bits per byte."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from thresher.tasks.base import Step, Task

IGNORED = -100


class LanguageModeling(Task):
    """Trains a network that maps token ids to logits of tokens; batches are (inputs, targets), -100 where ignored.

    Inputs are ids [b, n], or for a network with two inputs a pair of them. Losses and metrics are means over targets.

    Args:
        vocabulary: Number of token ids.
        bytes_per_token: How long tokens are on average in `val` and `test`; without it bits per byte are not reported.
        **task: See `Task`.
    """

    metric = "perplexity"

    def __init__(self, *args: Any, vocabulary: int, bytes_per_token: Mapping[str, float], **task: Any) -> None:
        self.vocabulary = vocabulary
        self.bytes_per_token = dict(bytes_per_token)
        super().__init__(*args, **task)

    def step(self, batch: tuple[Tensor | tuple[Tensor, ...], Tensor]) -> Step:
        inputs, targets = batch
        logits = self.net(*inputs) if isinstance(inputs, (tuple, list)) else self.net(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        return Step(loss, len(targets), logits, targets, targets != IGNORED)

    def weight(self, step: Step) -> Tensor:
        return (step.targets != IGNORED).sum()

    def training_metrics(self, step: Step) -> dict[str, Tensor]:
        return {"perplexity": step.loss.detach().exp()}

    def build_metrics(self, stage: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {
            "perplexity": Perplexity(ignore_index=IGNORED),
            "acc": TokenAccuracy(self.vocabulary),
        }
        if stage in self.bytes_per_token:
            metrics["bits_per_byte"] = BitsPerByte(self.bytes_per_token[stage])
        return metrics


class BitsPerByte(Perplexity):
    """Bits per byte of text under the model: comparable between tokenizers.

    Args:
        bytes_per_token: How long tokens are on average.
    """

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__(ignore_index=IGNORED)
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        return super().compute().log() / (math.log(2) * self.bytes_per_token)


class TokenAccuracy(MulticlassAccuracy):
    """Share of the targets that have the largest logit.

    Args:
        vocabulary: Number of token ids.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary, average="micro", ignore_index=IGNORED)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the targets of logits [b, n, vocabulary]."""
        super().update(preds.argmax(-1).flatten(), target.flatten())
