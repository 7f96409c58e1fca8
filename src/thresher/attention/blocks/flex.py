"""Tiles by FlexAttention, which skips the tiles that no row of a block keeps.

Some blocks at a time choose their tiles, and a `BlockMask` is built from the list of these tiles; nothing as large as
a map of all pairs is ever in memory on a GPU. There `torch.compile` generates the kernels, and compiles again for other
lengths. On a CPU PyTorch computes all pairs, and has no backward: that is for tests.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.attention.backends import Implementation
from thresher.attention.blocks.gather import split_rows
from thresher.attention.blocks.mechanism import Blocks
from thresher.attention.blocks.tiles import sum_tiles
from thresher.attention.contract import Attended
from thresher.attention.prepared import Prepared
from thresher.kernels.calling import unify_types

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SIZES = (64, 128, 256)  # of blocks and tiles
LEAST_WIDTH = 16  # of queries, keys and values, in the kernels that torch.compile generates


class FlexAttention(Implementation[Blocks]):
    """PyTorch's FlexAttention over tiles of keys, forward and backward, where thresholds do not train."""

    backend = "flex"
    device = None
    kernel = None

    def explain_refusal(self, mechanism: Blocks, x: Prepared) -> str | None:
        if mechanism.backend != "flex":
            return "it runs only where backend=flex asks for it"
        block = mechanism.block
        if block.keys not in SIZES or block.queries not in SIZES:
            return f"it has block.keys and block.queries of {', '.join(map(str, SIZES))} only"
        if min(x.head_dim, x.value_dim) < LEAST_WIDTH:
            return f"it needs heads of {LEAST_WIDTH} numbers or more"
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if x.call.slots is not None and x.n > 1:
            return "it needs queries in the order of their keys"
        if mechanism.estimate.scoring == "int8":
            return "it weighs kept keys by exact scores"
        if mechanism.tail is not None or x.dropout:
            return "it has no tail and no dropout of attention weights"
        if block.heads == "shared":
            return "it lets each head choose alone; set block.heads=own"
        if torch.compiler.is_compiling():
            return "it compiles its kernels itself"
        if mechanism.needs_loss:
            return "the auxiliary loss of block.rank=learned needs a map of all pairs"
        if mechanism.needs_slope and mechanism.wants_gradient(x):
            return "it has no gradient of thresholds; set gate.mode=hard"
        if x.device.type != "cpu" and x.grouped_q.dtype == torch.float64:
            return "its kernels have no torch.float64"
        return None

    def run(self, mechanism: Blocks, x: Prepared) -> Attended:
        x.trace_all()
        with torch.autocast(x.device.type, enabled=False):
            keep, pairs, *counts = choose_tiles(mechanism, x)
            mask = build_block_mask(mechanism, x, keep, pairs)
            q, k, v = unify_types(x.q, x.k, x.v)
            out = _find_function(x.device.type)(q, k, v, block_mask=mask, scale=x.scale)
        return Attended(out, mechanism.count_block_cost(x, *counts))


@functools.cache
def _find_function(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    found: Any = flex_attention if device == "cpu" else torch.compile(flex_attention)
    return found


@torch.no_grad()
def choose_tiles(
    mechanism: Blocks, x: Prepared
) -> tuple[
    Bool[Tensor, "b h n tiles"],
    Int[Tensor, "b h blocks tiles"],
    Float[Tensor, "b h"],
    Float[Tensor, "b h"],
    Float[Tensor, "b h"],
]:
    """Choose the tiles of each row, some blocks at a time.

    Returns:
        Which tiles each row keeps, the number of kept pairs in each tile of a block, and of each head the numbers of
        kept pairs, computed pairs, and kept pairs of rows that do not vote.
    """
    size = mechanism.block.keys
    tiles = -(-x.m // size)
    keep = torch.zeros(x.batch, x.heads, x.n, tiles, dtype=torch.bool, device=x.device)
    pairs, counts = [], []
    for rows in split_rows(mechanism, x):
        part = x.rows(rows)
        difference = mechanism.compare_to_choose(part)
        gate = mechanism.thresholds(difference, part.visible, mechanism.always_keep, surrogate=False)
        of_tiles = sum_tiles(gate.keep.expand(part.shape).int(), size)
        keep[:, :, rows.start : rows.stop, : of_tiles.shape[-1]] = of_tiles > 0
        of_blocks = mechanism.sum_blocks(of_tiles)
        pairs.append(torch.nn.functional.pad(of_blocks, (0, tiles - of_blocks.shape[-1])))
        counts.append((gate.kept, *mechanism.count_block_pairs(gate, part)))
    kept, computed, unscored = (torch.stack(each).sum(0) for each in zip(*counts, strict=True))
    return keep, torch.cat(pairs, 2), kept, computed, unscored


def build_block_mask(
    mechanism: Blocks, x: Prepared, keep: Bool[Tensor, "b h n tiles"], pairs: Int[Tensor, "b h blocks tiles"]
) -> "BlockMask":
    """Build the mask of a call from its list of tiles; tiles of which a block keeps all pairs need no mask inside.

    Args:
        mechanism: Says the sizes of blocks and tiles.
        x: The call.
        keep: Which tiles each row keeps.
        pairs: The number of kept pairs in each tile of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask  # takes seconds, and few calls need it

    queries, keys = mechanism.block.queries, mechanism.block.keys
    whole = pairs == queries * keys
    shown, shift = x.call.keys, x.causal_shift
    if shown is None:
        shown = torch.ones(1, x.m, dtype=torch.bool, device=x.device)
    of_example = shown.expand(x.batch, -1).contiguous()
    last = x.m if shift is None else shift  # of the keys that row 0 sees

    def see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return keep[b, h, i, j // keys] & of_example[b, j] & (j <= i + last)

    return BlockMask.from_kv_blocks(
        *_list_tiles((pairs > 0) & ~whole),
        *_list_tiles(whole),
        BLOCK_SIZE=(queries, keys),
        mask_mod=see,
        seq_lengths=(x.n, x.m),
    )


def _list_tiles(chosen: Bool[Tensor, "b h blocks tiles"]) -> tuple[Tensor, Tensor]:
    """List the chosen tiles of each block in ascending order: their number, and their indices before all others."""
    index = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), index.to(torch.int32)
