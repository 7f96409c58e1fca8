"""The tail of a row as kernels take it: sums over visible keys, and what a dropped key weighs (csrc/tail.h)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TailInputs(NamedTuple):
    """What a kernel computes tails from, in the type of sums; all None without a tail.

    Attributes:
        tail_scores: Sums of the scores of the keys that each query sees, [g, n].
        tail_values: Sums of their values, [g, n, dv], or [g, 1, dv] where all queries of a group see the same keys.
        tail_number: Number of these keys, [g, n].
        tail_factor: What a dropped key's weight is multiplied by, [g, n].
    """

    tail_scores: Tensor | None
    tail_values: Tensor | None
    tail_number: Tensor | None
    tail_factor: Tensor | None

    def fields(self) -> dict[str, Any]:
        """Return what C++ calls `Tail`."""
        values = self.tail_values
        inputs = {name: None if x is None else x.contiguous() for name, x in self._asdict().items()}
        per_row = self.tail_scores is not None and values is not None and values.shape[1] == self.tail_scores.shape[1]
        return {**inputs, "tail_per_row": per_row}

    def new_rows(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return room for one number a row, [g, n], or [g, 0] without a tail."""
        g, n = like.shape[:2]
        return like.new_empty(g, 0 if self.tail_scores is None else n, dtype=dtype)


NO_TAIL = TailInputs(None, None, None, None)


def place_tail_gradients(
    grad: Tensor, weight: Tensor, grad_scores: Tensor, grad_factor: Tensor, tail: TailInputs
) -> dict[str, Tensor]:
    """Return the gradients to the inputs of tails, by name.

    Args:
        grad: Gradient to the outputs [g, n, dv].
        weight: The weight of a dropped key without its factor [g, n].
        grad_scores: Gradient to the sums of scores [g, n].
        grad_factor: Gradient to the factors [g, n].
        tail: The inputs.
    """
    if tail.tail_factor is None or tail.tail_values is None:
        return {}
    values = (weight * tail.tail_factor)[..., None] * grad
    return {
        "tail_scores": grad_scores,
        "tail_values": values.sum_to_size(tail.tail_values.shape),
        "tail_factor": grad_factor,
    }
