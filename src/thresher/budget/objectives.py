"""How far the output of a sparse network is from that of the dense one."""

import math
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
    kind = _choose_kind(wanted, objective)
    one, other = (_find_tokens(output, batch, kind) for output in (found, wanted))
    if not other.isfinite().all():
        raise ValueError("the dense network's output is not finite, so nothing can be tuned against it")
    if kind == "kl":
        one, other = one.log_softmax(-1), other.log_softmax(-1)
        divergence = nn.functional.kl_div(one, other, log_target=True, reduction="none").sum(-1).mean()
        return divergence.clamp_min(0)  # rounding can take it below
    return (one - other).square().sum() / other.square().sum().clamp_min(torch.finfo(other.dtype).tiny)


def project(wanted: Any, batch: Any, objective: Objective, generator: torch.Generator) -> Tensor:
    """Project the dense output on a random direction, so that the squared change of the result estimates the error.

    For a small change of the output, its expectation over directions is what `measure_error` returns.
    """
    kind = _choose_kind(wanted, objective)
    x = _find_tokens(wanted, batch, kind)
    if kind == "error":
        direction = torch.randn(x.shape, generator=generator).to(x.device)
        return (x * direction).sum() / x.detach().norm()
    drawn = torch.rand(x.shape[:-1], generator=generator).to(x.device)
    logs = x.log_softmax(-1)
    label = (logs.detach().exp().cumsum(-1) < drawn[..., None]).sum(-1).clamp_max(x.shape[-1] - 1)
    return logs.gather(-1, label[..., None]).sum() / math.sqrt(2 * label.numel())


def _choose_kind(wanted: Any, objective: Objective) -> Literal["error", "kl"]:
    if objective != "auto":
        return objective
    return "kl" if getattr(wanted, "logits", None) is not None else "error"


def _find_tokens(output: Any, batch: Any, kind: str) -> Tensor:
    """Find the output to compare, without tokens that the batch hides, in fp32."""
    found = _find_output(output, kind)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == found.shape[:2] and found.ndim == 3:
        found = found[mask.bool()]
    return found.float()


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
