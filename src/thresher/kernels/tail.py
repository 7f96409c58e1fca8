"""The tail of rows in the operators of kernels (csrc/tail.h), which make the sums over visible keys themselves."""

import torch
from torch import Tensor


def new_tail_weights(q: Tensor, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    """Return room for the weight of a dropped key of each row, [g, n], or [g, 0] without a tail."""
    g, n = q.shape[:2]
    return q.new_empty(g, 0 if factor is None else n, dtype=dtype)


def new_factor_gradients(q: Tensor, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    """Return room for the gradient to the factors, [g], or [0] without a tail."""
    return q.new_empty(0 if factor is None else q.shape[0], dtype=dtype)


def place_factor_gradients(gradient: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
    """Return the gradient to the factors by name; nothing without a tail."""
    return {} if factor is None else {"tail_factor": gradient}
