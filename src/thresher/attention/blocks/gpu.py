"""Blocks on GPUs, in Triton: estimates and votes from integer products, then dense products with gathered keys.

Blocks vote, or mark what their rows choose, some at a time, so that memory grows with the number of tokens and of
chosen keys. Forward and backward read the same lists of chosen keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from thresher.attention.backends import Implementation
from thresher.attention.blocks.mechanism import Blocks
from thresher.attention.contract import Attended
from thresher.attention.latte.gpu import (
    attend_to_lists,
    build_masks,
    count_kept,
    encode_tokens,
    expand_thresholds,
    explain_refusal,
    read_output,
)
from thresher.attention.prepared import Prepared
from thresher.kernels.triton import lists
from thresher.kernels.triton.lists import Codes, Lists, Masks, Rows

MARKS = 2**24  # of a block and a key, in memory at a time


class BlocksOnGpu(Implementation[Blocks]):
    """The kernels of Triton over gathered keys, forward and backward."""

    backend = "triton"
    device = None  # the interpreter of triton runs on CPUs
    kernel = None

    def explain_refusal(self, mechanism: Blocks, x: Prepared) -> str | None:
        refused = explain_refusal(mechanism, x)
        if refused is None and not mechanism.block.is_plain:
            refused = f"it has no {mechanism.block.describe()}"
        if refused is None and mechanism.wants_gradient(x):
            if mechanism.votes and mechanism.needs_slope and mechanism.gate.into_scores:
                refused = "the gradient of a vote does not reach scores; use gate.into_scores=false"
            elif torch.are_deterministic_algorithms_enabled():
                refused = "it adds gradients of keys in no fixed order, and deterministic algorithms are required"
        others = "gather or reference compute" if x.call.pairs is None and x.call.bias is None else "reference computes"
        return refused and f"{refused}; backend={others} it"

    def run(self, mechanism: Blocks, x: Prepared) -> Attended:
        of_values = x.trace_all(values=mechanism.tail is not None)
        size = mechanism.block.queries
        with torch.autocast(x.device.type, enabled=False):
            codes, masks = encode_tokens(mechanism, x), build_masks(x)
            if mechanism.votes:
                listed = _list_votes(mechanism, x, codes, masks)
                found = attend_to_lists(mechanism, x, of_values, masks, listed, size, None, None)
            else:
                rows = lists.describe_rows(codes, masks, mechanism.unit == "spread", mass=False)
                listed = _list_unions(mechanism, x, codes, masks, rows)
                found = attend_to_lists(mechanism, x, of_values, masks, listed, size, codes, rows)
        of_rows, computed = (each.unflatten(0, (x.batch, x.heads)) for each in (found.of_rows, found.computed))
        kept = count_kept(found, mechanism, x)
        if mechanism.votes:
            computed = kept.detach()
            unscored = (of_rows * ~mechanism.find_voters(x)).sum(-1).to(kept.dtype)
        else:
            computed = computed.sum(-1).to(kept.dtype)
            unscored = torch.zeros_like(computed)
        cost = mechanism.count_block_cost(x, kept, computed, unscored)
        return Attended(read_output(found, mechanism, x), cost)


def _list_unions(mechanism: Blocks, x: Prepared, codes: Codes, masks: Masks, rows: Rows) -> Lists:
    """List the keys that the rows of each block choose."""
    size, threshold = mechanism.block.queries, expand_thresholds(mechanism, x).detach()
    return lists.list_marks(
        [
            lists.mark_chosen(codes, masks, rows, threshold, mechanism.always_keep, size, blocks)
            for blocks in _split_blocks(mechanism, x)
        ]
    )


@torch.no_grad()
def _list_votes(mechanism: Blocks, x: Prepared, codes: Codes, masks: Masks) -> Lists:
    """List the keys that each block votes for, with their differences."""
    codes, masks, size, counts = _select_voters(mechanism, x, codes, masks)
    rows = lists.describe_rows(codes, masks, spread=False, mass=True)
    shown = None if x.call.keys is None else x.call.keys[:, None, None]
    marks, differences = [], []
    for blocks in _split_blocks(mechanism, x):
        votes = lists.add_votes(codes, masks, rows, size, blocks).unflatten(0, (x.batch, x.heads))
        count = counts[:, :, blocks.start : blocks.stop, None]
        seen = (count > 0 if shown is None else (count > 0) & shown).expand(votes.shape)
        difference = mechanism.compare_votes(votes / count.clamp_min(1), seen)
        keep = mechanism.thresholds(difference, seen, mechanism.always_keep, surrogate=False).keep
        marks.append(keep.flatten(0, 1))
        differences.append(difference.flatten(0, 1))
    return lists.list_marks(marks, differences)


def _select_voters(mechanism: Blocks, x: Prepared, codes: Codes, masks: Masks) -> tuple[Codes, Masks, int, Tensor]:
    """Select the voting rows; return their codes, masks, and places in a block, and how many vote, [b, h, blocks]."""
    size, every = mechanism.block.queries, mechanism.block.every
    voters = mechanism.split_blocks(mechanism.find_voters(x)[..., None]).squeeze(-1)
    voters = voters.expand(x.batch, x.heads, -1, -1)
    counts, number = voters.sum(-1), -(-size // every)
    order = voters.byte().argsort(dim=-1, descending=True, stable=True)[..., :number]
    shown = voters.gather(-1, order).flatten(-2).flatten(0, 1)
    blocks = torch.arange(voters.shape[2], device=x.device)[:, None]
    rows = (blocks * size + order).clamp_max(x.n - 1).flatten(-2).flatten(0, 1)
    chosen = codes._replace(
        q=codes.q.gather(1, rows[..., None].expand(-1, -1, x.head_dim)), q_unit=codes.q_unit.gather(1, rows)
    )
    return chosen, masks._replace(shown_q=shown.contiguous()), number, counts


def _split_blocks(mechanism: Blocks, x: Prepared) -> Iterator[range]:
    """Split the blocks so that few enough of them have room for all keys at a time."""
    number, step = -(-x.n // mechanism.block.queries), max(MARKS // (x.batch * x.heads * x.m), 1)
    for start in range(0, number, step):
        yield range(start, min(start + step, number))
