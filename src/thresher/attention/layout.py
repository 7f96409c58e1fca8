"""Tokens in slots: to sort tokens into groups of equal size, and back, with gradients that are gathers too.

A layout is a partial permutation, one for each round and group of heads. Since every token has at most one slot
and every slot at most one token, moving rows and its gradient are both a gather: fast, and deterministic on any
device, where the scatter that autograd would use is neither.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Num
from torch import Tensor
from torch.nn import functional as F


class Layout(NamedTuple):
    """Where tokens go.

    Attributes:
        token: The token in each slot; n where it is empty.
        slot: The slot of each token; the number of slots where it has none.
    """

    token: Int[Tensor, "r g slots"]
    slot: Int[Tensor, "r g n"]


def layout_of(slot: Int[Tensor, "r g n"], slots: int) -> Layout:
    """Build a layout from the slot of each token; `slots` itself means none."""
    n = slot.shape[-1]
    token = slot.new_full((*slot.shape[:-1], slots + 1), n)
    token = token.scatter_(-1, slot, torch.arange(n, device=slot.device).expand_as(slot))
    return Layout(token[..., :slots], slot)


def rank_of(x: Num[Tensor, "r g n"]) -> Int[Tensor, "r g n"]:
    """Return the place of each element in ascending order, of equal ones the lower index first."""
    order = x.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


def to_slots(x: Tensor, layout: Layout) -> Tensor:
    """Move rows [g, n, d] to their slots [r, g, slots, d]; empty slots are zero."""
    r, g, slots = layout.token.shape
    moved: Tensor = _MoveRows.apply(x, layout.token.flatten(0, 1), layout.slot.flatten(0, 1))
    return moved.view(r, g, slots, x.shape[-1])


def from_slots(x: Tensor, layout: Layout) -> Tensor:
    """Move slots [r, g, slots, d] back to their tokens [r, g, n, d]; tokens without a slot are zero."""
    r, g, n = layout.slot.shape
    moved: Tensor = _MoveRows.apply(x.flatten(0, 1), layout.slot.flatten(0, 1), layout.token.flatten(0, 1))
    return moved.view(r, g, n, x.shape[-1])


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        ctx.groups = len(x)
        return _gather_rows(x, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        moved = _gather_rows(grads[0], back)
        return moved.view(-1, ctx.groups, *moved.shape[1:]).sum(0), None, None


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of x [g, n, d] by index [k, p] into [k, p, d]; k is a multiple of g, and index n gives zeros."""
    g, n, d = x.shape
    first = torch.arange(len(index), device=x.device) % g * (n + 1)
    rows = F.pad(x, (0, 0, 0, 1)).reshape(-1, d)
    return rows.index_select(0, (index + first[:, None]).flatten()).view(*index.shape, d)
