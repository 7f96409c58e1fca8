"""The two lines that users write: give a model a mechanism, and take it out again."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from thresher import attention as mechanisms
from thresher.hosts.core import holding, inject, take_out
from thresher.hosts.feedforward import FEED_FORWARD, inject_feed_forward


def sparsify(
    model: nn.Module,
    attention: str = "latte",
    *,
    where: str | None = None,
    example_inputs: Any = None,
    **hyperparameters: Any,
) -> list[str]:
    """Give `model` another attention, or with "topk_ffn" other feed-forward layers, in place.

    Args:
        model: A model whose attention a host knows, for example any timm vision transformer, most models of
            transformers, or with `example_inputs` any model that calls `F.scaled_dot_product_attention`.
        attention: Name of the mechanism; `thresher.attention.available()` lists those of attention.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        example_inputs: What the model takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        **hyperparameters: Of the mechanism, see its class.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: Unknown mechanism, unknown hyper-parameter, or nothing to replace.
    """
    make: Callable[..., Any] = FEED_FORWARD.get(attention) or mechanisms.find(attention)
    allowed = mechanisms.hyperparameters(make)
    if unknown := [name for name in hyperparameters if name not in allowed]:
        options = ", ".join(f"{name}={default!r}" for name, default in allowed.items()) or "none"
        raise ValueError(f"{attention} has no hyper-parameter {', '.join(map(repr, unknown))}; it has: {options}")
    make = partial(make, **hyperparameters)
    if attention in FEED_FORWARD:
        return inject_feed_forward(model, make, where=where)
    return inject(model, make, where=where, example_inputs=example_inputs)


def densify(model: nn.Module) -> list[str]:
    """Take every mechanism out again, in place; outputs and state dict are those of the original model.

    Returns:
        The names of the modules that were restored.

    Raises:
        ValueError: The model holds no mechanism.
    """
    names = holding(model)
    if not names:
        raise ValueError(f"{type(model).__name__} holds no mechanism: there is nothing to take out")
    take_out(model, names)
    return names
