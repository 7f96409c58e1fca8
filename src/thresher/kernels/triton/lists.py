"""The lists of keys, or of tiles of keys, that blocks of queries read: statistics of rows, marks, and their lists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.kernels.triton.launch import launch

TILE = 64  # rows, and keys, in a tile at most: a power of two, at least 16
LEAST_CODES = 32  # that a product of int8 needs in a vector


class Masks(NamedTuple):
    """Visible pairs.

    Attributes:
        shown_q: Queries that are not hidden, bool [g, n]; None means all.
        shown_k: Keys that are not hidden, bool [g, m]; None means all.
        shift: Query i sees keys j <= i + shift; None without causality.
    """

    shown_q: Tensor | None
    shown_k: Tensor | None
    shift: int | None


class Codes(NamedTuple):
    """Codes of queries and keys.

    Attributes:
        q: Codes of queries, int8 [g, n, d].
        k: Codes of keys, int8 [g, m, d].
        q_unit: Unit of the codes of each query, scale of scores included, [g, n].
        k_unit: Unit of the codes of each key, [g, m], or [g, 1] if all keys share it.
        step: Factor of the product of two codes.
    """

    q: Tensor
    k: Tensor
    q_unit: Tensor
    k_unit: Tensor
    step: float


class Rows(NamedTuple):
    """Statistics of rows over their visible estimates, fp32 [g, n].

    Attributes:
        best: The best estimate; 0 where nothing is visible.
        unit: The distance of the best from the mean, positive; None if differences are in nats.
        mass: The sum of exp(estimate - best); None if nobody votes.
    """

    best: Tensor
    unit: Tensor | None
    mass: Tensor | None


class Lists(NamedTuple):
    """A list for each block.

    Attributes:
        entries: The entries of all lists, int32 [number].
        starts: Where the list of a block begins, int64 [g, blocks].
        counts: Its length, int32 [g, blocks].
        differences: The difference of each entry, fp32 [number], where blocks vote.
    """

    entries: Tensor
    starts: Tensor
    counts: Tensor
    differences: Tensor | None = None


def pad_width(width: int, least: int = 16) -> int:
    """Round up to a power of two."""
    return max(1 << (width - 1).bit_length(), least)


def describe_codes(codes: Codes, masks: Masks) -> dict[str, Tensor | int | float | bool | None]:
    """List the arguments of kernels that say what codes and masks are."""
    return {
        "q_codes": codes.q,
        "q_units": codes.q_unit,
        "k_codes": codes.k,
        "k_units": codes.k_unit,
        "step": codes.step,
        "PER_KEY": codes.k_unit.shape[1] > 1,
        "D": codes.q.shape[2],
        **describe_hidden(masks),
    }


def describe_hidden(masks: Masks) -> dict[str, Tensor | bool | None]:
    """List the arguments of kernels that say which tokens are hidden."""
    return {
        "shown_q": masks.shown_q,
        "shown_k": masks.shown_k,
        "HIDES_Q": masks.shown_q is not None,
        "HIDES_K": masks.shown_k is not None,
    }


def describe_rows(codes: Codes, masks: Masks, spread: bool, mass: bool) -> Rows:
    """Find the statistics of rows."""
    (g, n, d), m = codes.q.shape, codes.k.shape[1]
    best = codes.q_unit.new_empty(g, n)
    rows = Rows(best, torch.empty_like(best) if spread else None, torch.empty_like(best) if mass else None)
    launch(
        "describe_rows",
        g * -(-n // TILE),
        codes.q.device,
        best_out=rows.best,
        unit_out=rows.unit,
        mass_out=rows.mass,
        n=n,
        m=m,
        shift=masks.shift or 0,
        PADDED=pad_width(d, LEAST_CODES),
        ROWS=TILE,
        KEYS=TILE,
        CAUSAL=masks.shift is not None,
        SPREAD=spread,
        MASS=mass,
        **describe_codes(codes, masks),
    )
    return rows


def add_votes(codes: Codes, masks: Masks, rows: Rows, size: int, blocks: range) -> Tensor:
    """Sum the probabilities that the rows of blocks of `size` give to each key, fp32 [g, blocks, m]."""
    (g, n, d), m = codes.q.shape, codes.k.shape[1]
    votes = codes.q_unit.new_zeros(g, len(blocks), m)
    launch(
        "add_votes",
        g * len(blocks) * -(-m // TILE),
        codes.q.device,
        best_in=rows.best,
        mass_in=rows.mass,
        votes=votes,
        n=n,
        m=m,
        size=size,
        first=blocks.start,
        blocks=len(blocks),
        PADDED=pad_width(d, LEAST_CODES),
        ROWS=choose_rows(size, TILE),
        KEYS=TILE,
        **describe_codes(codes, masks),
    )
    return votes


def mark_chosen(
    codes: Codes,
    masks: Masks,
    rows: Rows,
    threshold: Tensor,
    always_keep: int,
    size: int,
    blocks: range,
    tile: int | None = None,
) -> Tensor:
    """Mark the keys that any row of a block of `size` keeps, int8 [g, blocks, m], or tiles of keys, [g, blocks, tiles].

    Args:
        codes: Codes of queries and keys.
        masks: Visible pairs.
        rows: Statistics of rows.
        threshold: Thresholds [g].
        always_keep: Number of leading keys that are kept where visible.
        size: Number of rows in a block.
        blocks: The blocks.
        tile: Number of keys in a tile; None marks keys.
    """
    (g, n, d), m = codes.q.shape, codes.k.shape[1]
    keys = tile or TILE
    number = -(-m // keys)
    marks = codes.q.new_zeros(g, len(blocks), m if tile is None else number)
    launch(
        "mark_chosen",
        g * len(blocks) * number,
        codes.q.device,
        best_in=rows.best,
        unit_in=rows.unit,
        threshold=threshold,
        marks=marks,
        n=n,
        m=m,
        shift=masks.shift or 0,
        size=size,
        first=blocks.start,
        blocks=len(blocks),
        always_keep=always_keep,
        PADDED=pad_width(d, LEAST_CODES),
        ROWS=choose_rows(size, keys),
        KEYS=keys,
        CAUSAL=masks.shift is not None,
        SPREAD=rows.unit is not None,
        TILES=tile is not None,
        **describe_codes(codes, masks),
    )
    return marks


def choose_tile(dtype: torch.dtype, widths: tuple[int, int]) -> int:
    """Choose the number of keys in a tile, and of rows at most, so that tiles fit into shared memory.

    Args:
        dtype: Type of queries, keys and values.
        widths: Lengths of keys and of values.
    """
    tile = 64 if dtype.itemsize == 2 else 32
    return min(tile if max(widths) <= 128 else tile // 2, TILE)


def choose_rows(size: int, tile: int) -> int:
    """Choose the number of rows that a program reads of a block of `size`."""
    return min(pad_width(size), tile)


def list_marks(marks: Sequence[Tensor], differences: Sequence[Tensor] = ()) -> Lists:
    """List what is marked, some consecutive blocks at a time, [g, blocks, m]; this waits for the device.

    Args:
        marks: Marks of blocks.
        differences: Their differences, fp32 [g, blocks, m]; nothing unless blocks vote.
    """
    entries, starts, counts, of_entries, number = [], [], [], [], 0
    for at, part in enumerate(marks):
        marked = part != 0
        found = marked.flatten().nonzero().squeeze(-1)
        count = marked.sum(-1)
        starts.append((count.flatten().cumsum(0) - count.flatten()).view_as(count) + number)
        entries.append((found % max(part.shape[-1], 1)).int())
        counts.append(count.int())
        if differences:
            of_entries.append(differences[at].flatten()[found])
        number += len(found)
    index, difference = torch.cat(entries), torch.cat(of_entries) if of_entries else None
    return Lists(index, torch.cat(starts, 1).contiguous(), torch.cat(counts, 1).contiguous(), difference)
