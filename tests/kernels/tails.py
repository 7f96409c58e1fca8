"""Tails for tests that call operators themselves."""

import torch
from torch import Tensor

from thresher.kernels.tail import NO_TAIL, TailInputs
from thresher.testing.inputs import noise_like

WITHOUT = NO_TAIL._asdict()


def draw_tail(q: Tensor, v: Tensor, *, per_row: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Draw sums that belong to no keys: what an operator does with them is the same."""
    (g, n), m = q.shape[:2], v.shape[1]
    like = torch.empty(g, n, dtype=dtype or q.dtype)
    values = noise_like(like.new_empty(g, n if per_row else 1, v.shape[2]))
    tail = TailInputs(noise_like(like), values, torch.full_like(like, m), torch.full_like(like, 0.8))
    return {name: x.requires_grad_(q.requires_grad and name != "tail_number") for name, x in tail._asdict().items()}
