"""The two functions that users call: `sparsify` gives a model a mechanism, `densify` removes it."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from thresher import attention as mechanisms
from thresher.attention.options import flatten_options
from thresher.hosts.core import find_holders, inject, take_out
from thresher.hosts.feedforward import inject_feed_forward
from thresher.hosts.recipes import FEED_FORWARD


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
        model: A model whose attention a host supports, for example any timm vision transformer, most models of
            transformers, or with `example_inputs` any model that calls `F.scaled_dot_product_attention`.
        attention: Name of the mechanism; `thresher.attention.available()` lists those of attention.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        example_inputs: Inputs of the model: a tensor, a tuple of arguments or a dict of keyword arguments.
        **hyperparameters: Of the mechanism, see its class.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: Unknown mechanism, unknown hyper-parameter, or nothing to replace.
    """
    make: Callable[..., Any] = FEED_FORWARD.get(attention) or mechanisms.find(attention)
    allowed = mechanisms.hyperparameters(make)
    if unknown := [name for name in hyperparameters if name not in allowed]:
        options = ", ".join(f"{name}={default!r}" for name, default in allowed.items()) or "none"
        asked = ", ".join(map(repr, unknown))
        raise ValueError(f"{attention} has no hyper-parameter {asked}{_hint(unknown[0], allowed)} It has: {options}")
    make = partial(make, **hyperparameters)
    if attention in FEED_FORWARD:
        return inject_feed_forward(model, make, where=where)
    return inject(model, make, where=where, example_inputs=example_inputs)


def _hint(unknown: str, allowed: Mapping[str, Any]) -> str:
    """Suggest the option that was probably meant, which may be in a group."""
    flat = flatten_options(allowed)
    inner = next((name for name in flat if name.rpartition(".")[2] == unknown), None)
    close = inner or next(iter(difflib.get_close_matches(unknown, flat, n=1)), None)
    if close is None:
        return "."
    group, _, name = close.rpartition(".")
    return f"; did you mean {group}={{{name!r}: ...}}?" if group else f"; did you mean {name}?"


def densify(model: nn.Module) -> list[str]:
    """Remove every mechanism, in place; outputs and state dict become those of the original model.

    Returns:
        The names of the restored modules.

    Raises:
        ValueError: The model holds no mechanism.
    """
    names = find_holders(model)
    if not names:
        raise ValueError(f"{type(model).__name__} holds no mechanism: there is nothing to remove")
    take_out(model, names)
    return names
