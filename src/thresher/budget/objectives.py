"""How far the output of a sparse network is from that of the dense one."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Objective = Literal["auto", "error", "kl"]


def measure_error(found: Any, wanted: Any, batch: Any, objective: Objective) -> Tensor:
    """Measure how far an output lies from the dense one, over the tokens that the batch's `attention_mask` shows.

    Raises:
        ValueError: The dense output is not finite, or no tensor is found in it.
    """
    kind = objective if objective != "auto" else "kl" if getattr(wanted, "logits", None) is not None else "error"
    one, other = (_find_output(output, kind) for output in (found, wanted))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == other.shape[:2] and other.ndim == 3:
        one, other = one[mask.bool()], other[mask.bool()]
    if not other.isfinite().all():
        raise ValueError("the dense network's output is not finite, so nothing can be tuned against it")
    one, other = one.float(), other.float()
    if kind == "kl":
        one, other = one.log_softmax(-1), other.log_softmax(-1)
        return nn.functional.kl_div(one, other, log_target=True, reduction="none").sum(-1).mean()
    return (one - other).square().sum() / other.square().sum().clamp_min(torch.finfo(other.dtype).tiny)


def _find_output(output: Any, kind: str) -> Tensor:
    names = ("logits",) if kind == "kl" else ("last_hidden_state", "logits")
    for name in names:
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    first = output[0] if isinstance(output, tuple | list) else output
    if isinstance(first, Tensor):
        return first
    raise ValueError(
        f"the model returned {type(output).__name__}, in which no tensor to compare is found; "
        "pass forward= that returns one"
    )
