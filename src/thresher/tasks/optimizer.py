"""Optimisers with a parameter group for thresholds, and schedules.

Thresholds have another scale than weights (nats), must not decay, and need little momentum: with much momentum they
overshoot the budget. They are a group of the one optimiser, since gradient scalers would skip a second one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thresher.attention.options import check_number
from thresher.attention.shared.offsets import find_trainable_offsets
from thresher.attention.shared.selectors import named_selectors


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of a network into groups called decay, no_decay and thresholds.

    Not decayed: biases, norms and other vectors, selectors of mechanisms, and the parameters that the network's
    `no_weight_decay()` names. Empty groups are left out.
    """
    thresholds = list(find_trainable_offsets(net).values())
    own = set(map(id, thresholds))
    spared = set(getattr(net, "no_weight_decay", set)())
    selecting = {id(p) for _, selector in named_selectors(net) for p in selector.parameters()}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            is_spared = parameter.ndim <= 1 or name in spared or id(parameter) in selecting
            (no_decay if is_spared else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
        {"name": "thresholds", "params": thresholds, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    net: nn.Module,
    *,
    lr: float = 1.5e-3,
    weight_decay: float = 0.05,
    betas: Sequence[float] = (0.9, 0.999),
    threshold_lr: float = 3e-3,
    threshold_betas: Sequence[float] = (0.5, 0.999),
) -> Optimizer:
    """Build AdamW over the groups of `parameter_groups`.

    Raises:
        ValueError: A hyper-parameter is outside its range.
    """
    _check_rates(lr=lr, weight_decay=weight_decay, threshold_lr=threshold_lr)
    own, of_thresholds = _two_betas("betas", betas), _two_betas("threshold_betas", threshold_betas)
    groups = parameter_groups(net, weight_decay)
    for group in groups:
        if group["name"] == "thresholds":
            group |= {"lr": threshold_lr, "betas": of_thresholds}
    return torch.optim.AdamW(groups, lr=lr, betas=own)


def sgd(
    net: nn.Module,
    *,
    lr: float = 0.1,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
    threshold_lr: float = 1.0,
) -> Optimizer:
    """Build SGD with Nesterov momentum over the groups of `parameter_groups`; thresholds have no momentum.

    Raises:
        ValueError: A hyper-parameter is outside its range.
    """
    _check_rates(lr=lr, weight_decay=weight_decay, threshold_lr=threshold_lr)
    check_number("optimizer.momentum", momentum, least=0.0, below=1.0)
    groups = parameter_groups(net, weight_decay)
    for group in groups:
        if group["name"] == "thresholds":
            group |= {"lr": threshold_lr, "momentum": 0.0, "nesterov": False}
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def warmup_cosine(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.1, final: float = 0.01) -> LambdaLR:
    """Raise all learning rates linearly over a share `warmup` of the steps, then lower them by a cosine to `final`."""
    rise = _rise(warmup, total_steps)
    check_number("scheduler.final", final, least=0.0)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        fall = (step - rise) / max(total_steps - rise, 1)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Keep all learning rates constant, after a linear rise over a share `warmup` of the steps."""
    rise = _rise(warmup, total_steps)
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, 1.0))


def _rise(warmup: float, total_steps: int) -> int:
    check_number("scheduler.warmup", warmup, least=0.0)
    if warmup > 1:
        raise ValueError(f"scheduler.warmup is a share of the steps, at most 1; got {warmup}")
    return max(round(warmup * total_steps), 1)


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        check_number(f"optimizer.{name}", rate, least=0.0)


def _two_betas(name: str, pair: Sequence[float]) -> tuple[float, float]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"optimizer.{name} must be two numbers, got {pair!r}")
    for beta in pair:
        check_number(f"optimizer.{name}", beta, least=0.0, below=1.0)
    return float(pair[0]), float(pair[1])  # torch refuses an int beside a float
