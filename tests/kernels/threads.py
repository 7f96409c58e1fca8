"""What is computed with one thread and with several."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from thresher.attention import Mechanism
from thresher.testing.inputs import Inputs, gradients

Found = TypeVar("Found")


def with_threads(compute: Callable[[], Found]) -> list[Found]:
    """Return what `compute` returns with 1, 2 and 5 threads; their number is then what it was before."""
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(compute())
    finally:
        torch.set_num_threads(threads)
    return found


def check_threads(mechanism: Mechanism, inputs: Inputs) -> None:
    """Outputs and gradients are the same, to the last bit, with whatever number of threads."""

    def compute() -> list[Tensor | None]:
        attended, grads = gradients(mechanism, inputs)
        return [attended.out, *(grads[name] for name in "qkv")]

    found = with_threads(compute)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))  # type: ignore[arg-type]
