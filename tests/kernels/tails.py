"""Tails for tests that call operators themselves."""

import torch
from torch import Tensor

from thresher.kernels.calling import choose_sum_dtype

WITHOUT: dict[str, Tensor | None] = {"tail_factor": None}
DECODED_WITHOUT: dict[str, Tensor | None] = {"key_sum": None, "value_sum": None, "tail_factor": None}


def draw_tail(q: Tensor) -> dict[str, Tensor | None]:
    """Give each group a tail with a factor of its own."""
    factor = torch.linspace(0.6, 1.2, len(q), dtype=choose_sum_dtype(q))
    return {"tail_factor": factor.requires_grad_(q.requires_grad)}


def draw_decoded_tail(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor | None]:
    """Give each row a tail over all keys of its group."""
    dtype = choose_sum_dtype(q)
    factor = torch.linspace(0.6, 1.2, q.shape[0] * q.shape[1], dtype=dtype).view(q.shape[:2])
    return {"key_sum": k.to(dtype).sum(1), "value_sum": v.to(dtype).sum(1), "tail_factor": factor}
