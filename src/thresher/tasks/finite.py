"""Find where NaN and infinity come from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteError(ValueError):
    """A loss or a gradient was NaN or infinite."""


def all_finite(x: Tensor) -> Tensor:
    """Tell, in a tensor on the device of `x`, whether all values are finite, those of other processes included."""
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return torch.isfinite(whole).all()


def find_bad_layer(net: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Find the first module whose output is not finite, or None where all are.

    Args:
        net: The network.
        forward: Runs it, as it ran when the loss was not finite.
    """
    found: list[str] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not found and not all(all_finite(x) for x in walk_tensors(output)):
            found.append(name)

    handles = [m.register_forward_hook(partial(record, name or type(m).__name__)) for name, m in net.named_modules()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def find_bad_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Find the parameters whose gradient is not finite."""
    return [name for name, p in parameters if p.grad is not None and not all_finite(p.grad)]


def walk_tensors(x: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors inside of tuples, lists and mappings."""
    if isinstance(x, Tensor):
        if x.is_floating_point():
            yield x
    elif isinstance(x, Mapping):
        yield from walk_tensors(list(x.values()))
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from walk_tensors(each)
