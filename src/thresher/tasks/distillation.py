"""Distillation: a network in training learns from what it predicts itself under dense attention on the same batch.

The dense forward has no gradient and runs in evaluation mode. Without dropout the teacher is one network, and not
another draw in each step, so the term measures what sparsity costs and not what two draws differ by. It draws no
random numbers, so that the sparse forward has those that it would have without it, and statistics of normalisations
see each batch once.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.mechanism import dense_attention
from thresher.budget.calibration import evaluation_mode


@torch.no_grad()
def predict_densely(net: nn.Module, predict: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Predict with dense attention, in evaluation mode and without gradient.

    Args:
        net: The network.
        predict: Runs it on a batch.
        batch: The batch.
    """
    with dense_attention(), evaluation_mode(net):
        predictions = predict(batch)
    torch.clear_autocast_cache()  # it holds weights that were cast without gradient
    return predictions


def measure_divergence(
    found: Float[Tensor, "*places classes"],
    wanted: Float[Tensor, "*places classes"],
    counted: Bool[Tensor, " *places"] | None = None,
) -> Float[Tensor, ""]:
    """Measure the mean divergence of the softmax of logits from that of the wanted ones, in fp32.

    Args:
        found: Logits.
        wanted: Logits that they should equal.
        counted: Which predictions count; None is all.
    """
    one, other = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    each = F.kl_div(one, other, log_target=True, reduction="none").sum(-1)
    return each.mean() if counted is None else each.masked_fill(~counted, 0).sum() / counted.sum()
