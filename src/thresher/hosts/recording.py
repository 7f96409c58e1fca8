"""One recorded forward: which module attends, with how many heads, and in which pattern."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thresher.attention.base import Pattern


class Seen(NamedTuple):
    """What a recorded call tells about an attention module."""

    num_heads: int
    head_dim: int
    pattern: Pattern


class Recording:
    """What was seen of each module, in the order of their calls."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, Seen] = {}
        self.differing: set[nn.Module] = set()
        self._causal = False

    def add(
        self, module: nn.Module, num_heads: int, head_dim: int, n: int, m: int, *, causal: bool, cross: bool = False
    ) -> None:
        """Note one call with n queries and m keys.

        Nothing in a call of cross attention says whether later queries may matter. They may not where the self
        attention that ran before it, whose tokens these queries are, was causal.
        """
        if cross or n != m:
            pattern = Pattern((self._causal or causal, True))
        else:
            pattern, self._causal = Pattern((causal, False)), causal
        seen = Seen(num_heads, head_dim, pattern)
        if self.seen.setdefault(module, seen) != seen:
            self.differing.add(module)


def hides_future(mask: Tensor) -> bool:
    """Return whether a mask [.., n, m], boolean or additive, hides every key behind its query. Reads the values."""
    n, m = mask.shape[-2:]
    if n != m or n < 2:
        return False
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not (visible & visible.new_ones(n, m).triu(1)).any()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and give each module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model on a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict) or hasattr(example_inputs, "keys"):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)
