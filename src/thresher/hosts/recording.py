"""Record in one forward which modules attend, with how many heads, and in which pattern."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from thresher.attention.contract import Pattern


class Usage(NamedTuple):
    """How a model uses an attention module."""

    num_heads: int
    head_dim: int
    pattern: Pattern


class Recording:
    """Usage of each module, in the order of their calls."""

    def __init__(self) -> None:
        self.usages: dict[nn.Module, Usage] = {}
        self.differing: set[nn.Module] = set()
        self._causal = False

    def add(
        self, module: nn.Module, num_heads: int, head_dim: int, n: int, m: int, *, causal: bool, cross: bool = False
    ) -> None:
        """Add a call with n queries and m keys.

        A call of cross attention does not show whether later queries may matter. They may not if the self attention
        before it, on the same queries, was causal.
        """
        if cross or n != m:
            pattern = Pattern((self._causal or causal, True))
        else:
            pattern, self._causal = Pattern((causal, False)), causal
        usage = Usage(num_heads, head_dim, pattern)
        if self.usages.setdefault(module, usage) != usage:
            self.differing.add(module)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients, then restore the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model on a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict) or hasattr(example_inputs, "keys"):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)
