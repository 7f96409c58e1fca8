"""Compute attention weights on request, by a second call with one column of values for each key."""

import torch
from torch import Tensor, nn

from thresher.attention.contract import Call
from thresher.attention.maps import recover_weights
from thresher.hosts.peft import find_running


def attend_with_weights(mechanism: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attend; return also the weights [b, h, n, m] of the same random numbers, without a gradient.

    Raises:
        ValueError: The output is not a weighted sum of the values, or of values drawn at random.
    """
    inner = find_running(mechanism)
    if inner.training and inner.stochastic and inner.needs_source:
        raise ValueError(
            f"{type(inner).__name__} samples its values in training, so its output has no attention weights; "
            "ask for them in evaluation, model.eval()"
        )
    before = _get_random_state(q.device) if inner.training else None
    out = mechanism(q, k, v, call).out
    if before is None:
        return out, recover_weights(inner, q, k, v, call, out).weights
    after = _get_random_state(q.device)
    _set_random_state(q.device, before)
    try:
        return out, recover_weights(inner, q, k, v, call, out).weights
    finally:
        _set_random_state(q.device, after)


def _get_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
