"""Watches timm: each model that `create_model` returns is sparsified."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import nn


@contextmanager
def watch(sparsify: Callable[[nn.Module, list[Any]], None]) -> Iterator[None]:
    """Sparsify what `timm.create_model` returns, until the context ends."""
    create = timm.create_model

    def create_and_sparsify(*args: Any, **kwargs: Any) -> nn.Module:
        model = create(*args, **kwargs)
        sparsify(model, examples(model, kwargs.get("img_size")))
        return model

    with patch.object(timm, "create_model", create_and_sparsify):
        yield


@contextmanager
def narrow(names: set[str]) -> Iterator[None]:
    """Let `timm.list_models` know only some models: its tests have 15,000 parameters otherwise."""
    list_models = timm.list_models

    def list_some(*args: Any, **kwargs: Any) -> list[str]:
        return [name for name in list_models(*args, **kwargs) if name in names]

    with patch.object(timm, "list_models", list_some):
        yield


def examples(model: nn.Module, side: int | None) -> list[Any]:
    """Return inputs that may fit: pictures of the size asked for, of the model's own size, of 128 x 128, none."""
    channels, *size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    shapes = [(side, side) if side else tuple(size), (128, 128)]
    return [torch.zeros(2, channels, *shape) for shape in shapes] + [None]
