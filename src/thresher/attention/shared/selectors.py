"""Selectors: parameters that only select keys, and learn from an auxiliary loss instead of the loss of the task."""

from collections.abc import Iterator

from torch import nn


class Selector(nn.Module):
    """Base of the modules in a mechanism whose parameters learn from an auxiliary loss.

    Optimisers do not decay them, and a tuning of a frozen network trains them beside the thresholds.
    """


def named_selectors(model: nn.Module) -> Iterator[tuple[str, Selector]]:
    """Iterate over mechanisms with selectors: dotted name and selector."""
    for name, module in model.named_modules():
        if isinstance(module, Selector):
            yield name.rpartition(".")[0], module
