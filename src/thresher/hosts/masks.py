"""What other libraries' masks mean to a mechanism. Shapes and strides decide, never values: nothing waits for a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from thresher.attention.base import Mechanism


class Masked(NamedTuple):
    """Parts of a call: visible keys [b, m], visible pairs [#b, #h, n, m], additive bias [#b, #h, n, m]."""

    keys: Tensor | None = None
    pairs: Tensor | None = None
    bias: Tensor | None = None


def read_mask(mask: Tensor | None, b: int, n: int, m: int) -> Masked:
    """Read a mask that broadcasts to [b, h, n, m], True or 0 where visible.

    A mask that is one row for all queries and heads, in shape or in stride, is one of keys, and stays of linear size.
    Additive masks hide where they are below half of the lowest number; what is left of them is a bias.
    """
    if mask is None:
        return Masked()
    mask = mask[(None,) * (4 - mask.ndim)]
    by_keys = mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0) and mask.shape[3] == m
    bias = None
    if mask.dtype != torch.bool:
        visible = mask > torch.finfo(mask.dtype).min / 2
        bias = mask.masked_fill(~visible, 0).expand(-1, -1, n, m)
        mask = visible[:, :, :1] if by_keys else visible
    if by_keys:
        return Masked(keys=mask[:, 0, 0].expand(b, m), bias=bias)
    return Masked(pairs=mask.expand(-1, -1, n, m), bias=bias)


def seen_queries(mechanism: Mechanism, keys: Tensor | None, n: int) -> Tensor | None:
    """Return which tokens a mechanism sees as queries, from a mask [b, m] that speaks of keys alone; None is all.

    Padding asks, too, and its rows mean nothing; only a mechanism that ranks queries among each other must not see it.
    """
    own = keys is not None and keys.shape[1] == n and not mechanism.pattern.cross
    return keys if own and mechanism.ranks_queries else None


def add_biases(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of two biases, of which either may be missing."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def rescale(q: Tensor, scale: float | None) -> Tensor:
    """Prepare queries for a mechanism, which scales scores by D^-0.5 itself, where the host wants another scale."""
    size = q.shape[-1] ** 0.5
    return q if scale is None or abs(scale * size - 1) < 1e-9 else q * (scale * size)
