"""Blocks in PyTorch without a map of all pairs: gather the keys of each block, then multiply dense matrices.

Some blocks at a time have estimates for all keys; what is kept of them is gathered, and nothing else is computed.
Backward computes a group of blocks again, so memory grows with the number of tokens. The number of gathered keys is
the largest of these blocks; reading it waits for the device once for each group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thresher.attention.backends import Implementation
from thresher.attention.blocks.mechanism import Blocks
from thresher.attention.contract import Attended
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import (
    MAX_EXCESS,
    attach_slope,
    gated_softmax,
    masked_softmax,
    promote_to_fp32,
)
from thresher.attention.shared.tail import sum_visible_tokens

PAIRS = 2**22  # whose estimates are in memory at a time


class Chosen(NamedTuple):
    """The keys of each block, and the gates of its rows for them.

    Attributes:
        gathered: Indices of the gathered keys, [b, h, blocks, keys].
        keep: Pairs of a row and a gathered key that are kept, [b, h, blocks, queries, keys].
        slope: The gate's slope at these pairs; None without gradient.
        kept: Number of kept pairs, [b, h].
        computed: Number of visible pairs of rows and the keys of their block, [b, h].
        unscored: Number of kept pairs of rows that do not vote, [b, h].
    """

    gathered: Tensor
    keep: Tensor
    slope: Tensor | None
    kept: Tensor
    computed: Tensor
    unscored: Tensor


class Gathering(Implementation[Blocks]):
    """Gathers the keys of each block, on any device, forward and backward."""

    backend = "gather"
    device = None
    kernel = None

    def explain_refusal(self, mechanism: Blocks, x: Prepared) -> str | None:
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if mechanism.estimate.scoring == "int8":
            return "it weighs kept keys by exact scores"
        if torch.compiler.is_compiling():
            return "the number of keys that it gathers is not known before it runs"
        if x.dropout and mechanism.tail is not None:
            return "it has no dropout of a tail"
        if x.dropout and mechanism.pattern.causal:
            return "the number of weights that it drops from would tell a row of later tokens"
        if mechanism.block.heads == "shared":
            return "it lets each head choose alone; set block.heads=own"
        if mechanism.needs_loss:
            return "the auxiliary loss of block.rank=learned needs a map of all pairs"
        if not mechanism.wants_gradient(x) or mechanism.gate.mode == "hard":
            return None
        if mechanism.gate.into_scores:
            return "it has no gradient of the gate into the scores; set gate.into_scores=false"
        surrogate = mechanism.gate.surrogate
        return None if surrogate == "inside" else f"gate.surrogate={surrogate} reaches dropped keys; set inside"

    def run(self, mechanism: Blocks, x: Prepared) -> Attended:
        x.trace_all()
        with torch.autocast(x.device.type, enabled=False):
            sums = None if mechanism.tail is None else sum_visible_tokens(x)
            parts = [
                checkpoint(_attend_to_rows, mechanism, x, rows, sums, use_reentrant=False)
                for rows in split_rows(mechanism, x)
            ]
        outs, *counts = zip(*parts, strict=True)
        kept, computed, unscored = (torch.stack(each).sum(0) for each in counts)
        return Attended(torch.cat(outs, 2), mechanism.count_block_cost(x, kept, computed, unscored))


def split_rows(mechanism: Blocks, x: Prepared) -> Iterator[range]:
    """Split rows into whole blocks, but for the last, few enough to have estimates for all keys in memory."""
    size = mechanism.block.queries
    step = size * max(PAIRS // (x.batch * x.heads * size * x.m), 1)
    for start in range(0, x.n, step):
        yield range(start, min(start + step, x.n))


def _attend_to_rows(
    mechanism: Blocks, x: Prepared, rows: range, sums: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to some consecutive rows, a whole number of blocks but for the last; return outputs and counts."""
    part = x.rows(rows)
    q = mechanism.split_blocks(promote_to_fp32(part.q) * part.scale)  # before the choice, which has no gradient
    threshold = mechanism.thresholds.values()
    chosen = _choose_keys(mechanism, part)
    k, v = (_gather_tokens(tokens, chosen.gathered) for tokens in (promote_to_fp32(part.k), part.v))
    scores = q @ k.mT
    kept = chosen.kept
    if chosen.slope is not None:
        kept = attach_slope(kept, chosen.slope.sum((2, 3, 4)).to(kept.dtype), threshold)
    if sums is None or mechanism.tail is None:
        weights = _weigh(scores, chosen, threshold[:, None, None])
        out = F.dropout(weights, part.dropout, part.dropout > 0).to(v.dtype) @ v
    else:
        opened = chosen.keep.to(scores.dtype)
        if chosen.slope is not None:
            opened = attach_slope(opened, chosen.slope, threshold[:, None, None, None])
        with torch.no_grad():
            top = scores.masked_fill(~chosen.keep, float("-inf")).amax(-1, keepdim=True)
            top = top.masked_fill(top == float("-inf"), 0)
        share = (scores - top).clamp_max(MAX_EXCESS).exp()
        of_k, of_v = (_select_sums(mechanism, each, rows, x.n) for each in sums)
        visible = part.visible_keys.expand(part.batch, part.heads, -1)[..., None].to(scores.dtype)
        count = mechanism.split_blocks(visible) - opened.sum(-1, keepdim=True)
        some = count.detach() > 0.5
        mean = ((q * of_k).sum(-1, keepdim=True) - (opened * scores).sum(-1, keepdim=True)) / torch.where(
            some, count, 1
        )
        factor = mechanism.tail.values().to(scores.dtype)[:, None, None, None]
        tail = factor * (mean - top).clamp_max(MAX_EXCESS).exp().masked_fill(~some, 0)
        weights = opened * share
        total = weights.sum(-1, keepdim=True) + tail * count
        total = torch.where(total.detach() > 0, total, 1)
        weights, tail = weights / total, tail / total
        out = (weights - opened * tail).to(v.dtype) @ v + (tail * of_v).to(v.dtype)
    out = out.flatten(2, 3)[:, :, : len(rows)]
    return out, kept, chosen.computed, chosen.unscored


def _weigh(scores: Tensor, chosen: Chosen, threshold: Tensor) -> Tensor:
    """Compute the softmax of each row over its kept keys, with the gate's gradient to the threshold."""
    rows, keep = scores.flatten(2, 3), chosen.keep.flatten(2, 3)
    if chosen.slope is None:
        return masked_softmax(rows, keep).view_as(scores)
    return gated_softmax(rows, threshold, keep, chosen.slope.flatten(2, 3), into_scores=False).view_as(scores)


@torch.no_grad()
def _choose_keys(mechanism: Blocks, part: Prepared) -> Chosen:
    difference = mechanism.compare_to_choose(part)
    gate = mechanism.thresholds(difference, part.visible, mechanism.always_keep, surrogate=False)
    rows = gate.keep.expand(part.shape)
    chosen = mechanism.sum_blocks(rows) > 0
    index = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., : int(chosen.sum(-1).max())]
    wide = index[..., None, :].expand(-1, -1, -1, mechanism.block.queries, -1)
    keep, slope = mechanism.split_blocks(rows).gather(-1, wide), None
    if mechanism.needs_slope:
        all_slopes = mechanism.thresholds.compute_slope(difference, part.visible, mechanism.always_keep)
        slope = mechanism.split_blocks(all_slopes.expand(part.shape)).gather(-1, wide)
    return Chosen(index, keep, slope, gate.kept, *mechanism.count_block_pairs(gate, part))


def _gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather tokens [b, h, m, width] of each block, [b, h, blocks, keys, width]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, tokens.shape[-1])
    return tokens.gather(2, flat).unflatten(2, index.shape[2:])


def _select_sums(mechanism: Blocks, sums: Tensor, rows: range, n: int) -> Tensor:
    """Select the sums of some rows, [b, h, blocks, queries, width]."""
    if sums.shape[2] == 1 and n > 1:
        return sums[:, :, None]
    return mechanism.split_blocks(sums[:, :, rows.start : rows.stop])
