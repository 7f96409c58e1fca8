"""Optimisers and schedules: every number is checked by its name before anything is trained with it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from thresher.tasks.optimizer import adamw, constant, sgd, warmup_cosine

NAN, INF = math.nan, math.inf
RATES = (-1e-3, NAN, INF, -INF, "0.1", None, True, [0.1])
BETAS = (0.9, [0.9], [0.9, 0.99, 0.999], "ab", None, [0.9, 1.0], [-0.1, 0.9], [NAN, 0.9], [0.9, "x"], [0.9, None])


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("option", ["lr", "weight_decay", "threshold_lr"])
def test_rates_are_finite_and_not_negative(make: Callable[..., Optimizer], option: str) -> None:
    for value in RATES:
        with pytest.raises(ValueError, match=rf"optimizer\.{option} must be a finite number, at least 0; got"):
            make(nn.Linear(2, 2), **{option: value})
    assert make(nn.Linear(2, 2), **{option: 0})


@pytest.mark.parametrize("option", ["betas", "threshold_betas"])
def test_betas_are_two_numbers_below_one(option: str) -> None:
    for value in BETAS:
        with pytest.raises(ValueError, match=rf"optimizer\.{option} must be"):
            adamw(nn.Linear(2, 2), **{option: value})
    assert adamw(nn.Linear(2, 2), **{option: (0, 0.5)})


@pytest.mark.parametrize("value", [-0.1, 1, NAN, "0.9", None])
def test_momentum_is_below_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.momentum must be a finite number, at least 0 and below 1; got"):
        sgd(nn.Linear(2, 2), momentum=value)


@pytest.mark.parametrize("make", [constant, warmup_cosine])
def test_warm_up_is_a_share_of_the_steps(make: Callable[..., Any]) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    for value in (-0.1, 1.5, NAN, INF, "0.1", None, True):
        with pytest.raises(ValueError, match=r"scheduler\.warmup"):
            make(optimizer, total_steps=10, warmup=value)
    for value in (0, 1):
        assert make(optimizer, total_steps=10, warmup=value).get_last_lr()[0] > 0


@pytest.mark.parametrize("value", [-0.1, NAN, INF, "0", None])
def test_the_last_share_of_the_rate_is_finite_and_not_negative(value: Any) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"scheduler\.final must be a finite number, at least 0; got"):
        warmup_cosine(optimizer, total_steps=10, final=value)
