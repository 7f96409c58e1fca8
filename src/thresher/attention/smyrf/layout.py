"""Layouts of tokens in slots: gather tokens into groups of equal size, in one or more rounds, and sum them again.

A layout is a partial permutation for each round and group of heads, with the slots of all rounds in one dimension. Each
token has at most one slot in a round, and each slot at most one token. So both directions and their gradients are
gathers, fast and deterministic on any device; the scatter that autograd would use is neither.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F


class Layout(NamedTuple):
    """The slots of tokens; a token has a slot in each round or in none.

    Attributes:
        token: Token in each slot; n where the slot is empty.
        slot: Slot of each token in each round; the number of slots where it has none.
    """

    token: Int[Tensor, "g slots"]
    slot: Int[Tensor, "r g n"]


def find_unplaced(layout: Layout) -> Bool[Tensor, "g n"]:
    """Find the tokens without slots."""
    return layout.slot[0] == layout.token.shape[1]


def build_layout(slot: Int[Tensor, "r g n"], slots: int) -> Layout:
    """Build a layout from the slot of each token in each round; the value `slots` means none."""
    r, g, n = slot.shape
    token = slot.new_full((g, slots + 1), n)
    tokens = torch.arange(n, device=slot.device).repeat(r).expand(g, -1)
    return Layout(token.scatter_(-1, slot.transpose(0, 1).flatten(1), tokens)[:, :slots], slot)


def compute_ranks(x: Num[Tensor, "r g n"]) -> Int[Tensor, "r g n"]:
    """Rank elements in ascending order; equal elements rank by index."""
    order = x.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


def gather_slots(x: Float[Tensor, "g n d"], token: Int[Tensor, "g slots"]) -> Float[Tensor, "g slots d"]:
    """Gather the rows of tokens into slots; an empty slot receives an arbitrary row of its group."""
    g, n, d = x.shape
    first = torch.arange(g, device=x.device)[:, None] * n
    return x.reshape(g * n, d).index_select(0, (token.clamp_max(n - 1) + first).flatten()).view(g, -1, d)


def sum_slots(
    x: Float[Tensor, "g slots d"], layout: Layout, weights: Float[Tensor, "r g n"] | None = None
) -> Float[Tensor, "g n d"]:
    """Sum the slots of each token, with a weight for each round; a token without slots gets zero."""
    (g, slots, d), (r, _, n) = x.shape, layout.slot.shape
    index = layout.slot.clamp_max(slots - 1) + torch.arange(g, device=x.device)[:, None] * slots
    bags = index.permute(1, 2, 0).reshape(g * n, r)
    if weights is not None:
        weights = weights.permute(1, 2, 0).reshape(g * n, r)
    summed = F.embedding_bag(bags, x.reshape(g * slots, d), mode="sum", per_sample_weights=weights).view(g, n, d)
    return summed.masked_fill_(find_unplaced(layout)[..., None], 0)
