"""Leaks through the masks of a whole model: change what a mask hides, and measure how far the other outputs move.

The checks in `leaks.py` ask a mechanism, and bit for bit; these ask whatever model a mechanism is mounted into.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest output: rounding stays below
NOISE = 3.0  # standard deviations

Inputs = Any  # a tensor, a tuple of arguments or a dict of keyword arguments


@dataclass(frozen=True)
class Change:
    """Two inputs that differ in what some outputs must not see.

    Attributes:
        kind: "padding", "future" or "neighbours".
        before: Inputs.
        after: The same inputs with the change.
        tokens: Outputs [b, n] that must not move; None if the model has no outputs of tokens.
        examples: Outputs [b] that must not move, of a model with one output for each example; None if all may.
        noise: Tokens [b, n] whose embeddings become noise, besides; None for none.
    """

    kind: str
    before: Inputs
    after: Inputs
    tokens: Tensor | None
    examples: Tensor | None
    noise: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A model, and the changes that its masks must hide.

    Attributes:
        model: In evaluation mode.
        run: Calls it with inputs; returns outputs [b, n, ...] or [b, ...].
        changes: Changes to try.
        example_inputs: For hosts that must see a call to know what attends.
        mounted: Whether the model holds mechanisms already.
    """

    model: nn.Module
    run: Callable[[Inputs], Tensor]
    changes: Sequence[Change]
    example_inputs: Inputs = None
    mounted: bool = False


def measure_leaks(subject: Subject, changes: Sequence[Change]) -> dict[str, float]:
    """Measure each change, by kind; changes that nothing can be said about are left out."""
    measured = {change.kind: measure_leak(subject, change) for change in changes}
    return {kind: value for kind, value in measured.items() if value is not None}


@torch.no_grad()
def measure_leak(subject: Subject, change: Change) -> float | None:
    """Measure how far outputs move that must not, relative to the largest.

    Returns:
        The largest movement; None where the outputs have another shape than the change speaks of.
    """
    before = subject.run(change.before)
    with add_noise(subject.model, change.before, change.noise):
        after = subject.run(change.after)
    has_tokens = change.tokens is not None and before.ndim >= 3 and before.shape[:2] == change.tokens.shape
    still = change.tokens if has_tokens else change.examples
    if still is None or len(still) != len(before):
        return None
    largest = float(before[still].abs().max())
    return float((after[still] - before[still]).abs().max()) / max(largest, torch.finfo(before.dtype).tiny)


def find_leaks(movements: Mapping[str, float]) -> list[str]:
    """Return the kinds of change by which outputs move more than rounding explains."""
    return [kind for kind, value in movements.items() if not value <= TOLERANCE]


@contextmanager
def add_noise(model: nn.Module, inputs: Inputs, noise: Tensor | None) -> Iterator[None]:
    """Replace the embeddings of some tokens of the inputs by noise, while it is entered."""
    if noise is None:
        yield
        return
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    ids = [x for x in values if isinstance(x, Tensor) and not x.is_floating_point() and x.shape == noise.shape]
    generator = torch.Generator().manual_seed(1)

    def replace(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not any(args[0].shape == x.shape and torch.equal(args[0], x) for x in ids):
            return out
        draws = torch.randn(out.shape, generator=generator).to(out) * NOISE * out.std()
        return torch.where(noise[..., None], draws, out)

    handles = [m.register_forward_hook(replace) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
