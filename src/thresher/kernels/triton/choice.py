"""The choice of keys: statistics of rows over their estimates, votes of blocks, and what rows choose.

Programs are in one dimension, groups last. Codes are int8; their products are exact in int32.
"""

import triton
import triton.language as tl

from thresher.kernels.triton.pieces import estimate, find_shown, find_visible, load_rows, load_units, open_gate


@triton.jit
def describe_rows(
    q_codes, q_units, k_codes, k_units, shown_q, shown_k, best_out, unit_out, mass_out, n, m, shift, step,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr, SPREAD: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Find each row's best estimate, the unit of its differences, and the sum of exp(estimate - best)."""
    tiles = tl.cdiv(n, ROWS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    valid = rows < n
    shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
    codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED)
    units = tl.load(q_units + group * n + rows, mask=valid, other=0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) % tiles + 1) * ROWS + shift)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        exists = keys < m
        visible = find_visible(rows, shown, keys, find_shown(shown_k, group, m, keys, exists, HIDES_K), shift, CAUSAL)
        of_keys = load_rows(k_codes + group * m * D, keys, exists, D, PADDED)
        found = estimate(codes, units, of_keys, load_units(k_units, group, m, keys, exists, PER_KEY), step)
        higher = tl.maximum(best, tl.max(tl.where(visible, found, float("-inf")), 1))
        if MASS:
            level = tl.where(higher == float("-inf"), 0, higher)
            weight = tl.where(visible, tl.exp(found - level[:, None]), 0)
            mass = mass * tl.exp(best - level) + tl.sum(weight, 1)
        best = higher
        total += tl.sum(tl.where(visible, found, 0), 1)
        count += tl.sum(visible.to(tl.int32), 1)
    best = tl.where(best == float("-inf"), 0, best)
    tl.store(best_out + group * n + rows, best, mask=valid)
    if SPREAD:
        mean = total / tl.maximum(count, 1).to(tl.float32)
        unit = tl.maximum(best - mean, 1.1920928955078125e-07)
        tl.store(unit_out + group * n + rows, unit, mask=valid)
    if MASS:
        tl.store(mass_out + group * n + rows, mass, mask=valid)


@triton.jit
def add_votes(
    q_codes, q_units, k_codes, k_units, shown_q, shown_k, best_in, mass_in, votes, n, m, size, first, blocks, step,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities that the rows of `blocks` blocks from the `first` on give to each key.

    A block has `size` rows; the result is [groups, blocks, m].
    """
    tiles = tl.cdiv(m, KEYS)
    keys = (tl.program_id(0) % tiles) * KEYS + tl.arange(0, KEYS)
    block = (tl.program_id(0) // tiles) % blocks
    group = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    exists = keys < m
    shown_keys = find_shown(shown_k, group, m, keys, exists, HIDES_K)
    of_keys = load_rows(k_codes + group * m * D, keys, exists, D, PADDED)
    k_unit = load_units(k_units, group, m, keys, exists, PER_KEY)
    found = tl.zeros((KEYS,), tl.float32)
    for start in range(0, size, ROWS):
        within = start + tl.arange(0, ROWS)
        rows = (first + block) * size + within
        valid = (within < size) & (rows < n)
        shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
        codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED)
        units = tl.load(q_units + group * n + rows, mask=valid, other=0)
        best = tl.load(best_in + group * n + rows, mask=valid, other=0)
        mass = tl.load(mass_in + group * n + rows, mask=shown, other=1)
        visible = shown[:, None] & shown_keys[None, :]
        share = tl.exp(estimate(codes, units, of_keys, k_unit, step) - best[:, None]) / mass[:, None]
        found += tl.sum(tl.where(visible, share, 0), 0)
    tl.store(votes + (group * blocks + block) * m + keys, found, mask=exists)


@triton.jit
def mark_chosen(
    q_codes, q_units, k_codes, k_units, shown_q, shown_k, best_in, unit_in, threshold, marks,
    n, m, shift, size, first, blocks, always_keep, step,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr, SPREAD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Mark what any row of a block chooses: keys, [groups, blocks, m], or TILES of keys, [groups, blocks, tiles]."""
    tiles = tl.cdiv(m, KEYS)
    tile = tl.program_id(0) % tiles
    keys = tile * KEYS + tl.arange(0, KEYS)
    block = (tl.program_id(0) // tiles) % blocks
    group = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    exists = keys < m
    theta = tl.load(threshold + group)
    shown_keys = find_shown(shown_k, group, m, keys, exists, HIDES_K)
    of_keys = load_rows(k_codes + group * m * D, keys, exists, D, PADDED)
    k_unit = load_units(k_units, group, m, keys, exists, PER_KEY)
    chosen = tl.zeros((KEYS,), tl.int32)
    end = size
    if CAUSAL:
        last = (first + block + 1) * size - 1 + shift
        end = tl.where(tile * KEYS > last, 0, size)
    for start in range(0, end, ROWS):
        within = start + tl.arange(0, ROWS)
        rows = (first + block) * size + within
        valid = (within < size) & (rows < n)
        shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
        codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED)
        units = tl.load(q_units + group * n + rows, mask=valid, other=0)
        best = tl.load(best_in + group * n + rows, mask=valid, other=0)
        unit = tl.full((ROWS,), 1, tl.float32)
        if SPREAD:
            unit = tl.load(unit_in + group * n + rows, mask=valid, other=1)
        visible = find_visible(rows, shown, keys, shown_keys, shift, CAUSAL)
        found = estimate(codes, units, of_keys, k_unit, step)
        keep = open_gate(found, best, unit, theta, keys, visible, always_keep)
        chosen = tl.maximum(chosen, tl.max(keep.to(tl.int32), 0))
    if TILES:
        tl.store(marks + (group * blocks + block) * tiles + tile, tl.max(chosen, 0).to(tl.int8))
    else:
        tl.store(marks + (group * blocks + block) * m + keys, chosen.to(tl.int8), mask=exists)
