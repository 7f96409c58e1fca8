"""The backward pass over the lists of the forward pass.

`back_lists` computes the gradients of queries and thresholds, and adds those of gathered keys and values. With tiles,
`back_tiles` computes the latter from the transposed lists, each key tile by one program, in a fixed order.
"""

import triton
import triton.language as tl

from thresher.kernels.triton.pieces import (
    estimate,
    find_shown,
    find_slope,
    find_visible,
    load_rows,
    load_units,
    multiply,
    open_gate,
    store_rows,
)


@triton.jit
def differentiate(
    queries, gathered, values, grads, keep, difference, keys, row, unit,
    theta, tau, grad_kept, always_keep, scale,
    TAIL: tl.constexpr, SLOPE: tl.constexpr, SPREAD: tl.constexpr, INTO_SCORES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Find the gradients of scores, the weights that values have, and the gradient of the threshold, of one tile.

    `row` holds for each row its largest score, the sum of its exponentials, the product of its output and its gradient,
    and of its tail the weight of a dropped key, the gradient to the score of each, and their mean score.
    """
    top, total, inner, tail, share, mean = row
    scores = multiply(queries, tl.trans(gathered), PRECISION, UPCAST) * scale
    weights = tl.where(keep, tl.exp(scores - top[:, None]), 0) / total[:, None]
    benefit = multiply(grads, tl.trans(values), PRECISION, UPCAST) - inner[:, None]
    of_scores = weights * benefit
    if TAIL:
        weights -= tl.where(keep, tail[:, None], 0)
        of_scores -= tl.where(keep, share[:, None], 0)
    of_threshold = 0.0
    if SLOPE:
        slope = find_slope(difference, keep, theta, tau, keys, always_keep)
        through = weights * benefit
        if TAIL:
            through += share[:, None] * (mean[:, None] - scores)
        of_threshold = tl.sum(tl.sum(slope * (through + grad_kept), 1), 0)
        if INTO_SCORES:
            worth = tl.full(unit.shape, 1, tl.float32)
            if SPREAD:
                worth = tl.maximum(unit, 1)
            of_scores += through * slope / worth[:, None]
    return of_scores, weights, of_threshold


@triton.jit
def load_row(top, total, inner, tail, share, mean, at, valid, TAIL: tl.constexpr):
    """Load what backward knows of each row."""
    of_top = tl.load(top + at, mask=valid, other=0)
    of_total = tl.load(total + at, mask=valid, other=1)
    of_inner = tl.load(inner + at, mask=valid, other=0)
    if TAIL:
        of_tail = tl.load(tail + at, mask=valid, other=0)
        of_share = tl.load(share + at, mask=valid, other=0)
        of_mean = tl.load(mean + at, mask=valid, other=0)
        return of_top, of_total, of_inner, of_tail, of_share, of_mean
    else:
        return of_top, of_total, of_inner, of_top, of_top, of_top


@triton.jit
def back_lists(
    q, k, v, grad, threshold, tau_in, grad_kept_in, top, total, inner, tail, share, mean, scale,
    index, starts, counts, differences, shown_q, shown_k, q_codes, q_units, k_codes, k_units, best_in, unit_in,
    grad_q, grad_k, grad_v, grad_threshold,
    n, m, shift, size, blocks, parts, always_keep, step,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr, PADDED_C: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr, CAUSAL: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr, SPREAD: tl.constexpr,
    TAIL: tl.constexpr, SLOPE: tl.constexpr, INTO_SCORES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of queries and of thresholds, one a program; add those of gathered keys and values."""
    part = tl.program_id(0) % parts
    block = (tl.program_id(0) // parts) % blocks
    group = (tl.program_id(0) // parts // blocks).to(tl.int64)
    within = part * ROWS + tl.arange(0, ROWS)
    rows = block * size + within
    valid = (within < size) & (rows < n)
    shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
    queries = load_rows(q + group * n * D, rows, valid, D, PADDED)
    grads = load_rows(grad + group * n * DV, rows, valid, DV, PADDED_V)
    row = load_row(top, total, inner, tail, share, mean, group * n + rows, valid, TAIL)
    theta = tl.load(threshold + group)
    unit = tl.full((ROWS,), 1, tl.float32)
    tau = 1.0
    grad_kept = 0.0
    if SLOPE:
        tau = tl.load(tau_in)
        grad_kept = tl.load(grad_kept_in + group)
    if GATED:
        codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED_C)
        units = tl.load(q_units + group * n + rows, mask=valid, other=0)
        best = tl.load(best_in + group * n + rows, mask=valid, other=0)
        if SPREAD:
            unit = tl.load(unit_in + group * n + rows, mask=valid, other=1)
    first = tl.load(starts + group * blocks + block)
    entries = tl.load(counts + group * blocks + block)
    of_queries = tl.zeros((ROWS, PADDED), tl.float32)
    of_threshold = 0.0
    for at in range(0, entries, 1 if TILES else KEYS):
        if TILES:
            keys = tl.load(index + first + at) * KEYS + tl.arange(0, KEYS)
            listed = keys < m
        else:
            listed = at + tl.arange(0, KEYS) < entries
            keys = tl.load(index + first + at + tl.arange(0, KEYS), mask=listed, other=0)
        keep = find_visible(rows, shown, keys, find_shown(shown_k, group, m, keys, listed, HIDES_K), shift, CAUSAL)
        difference = tl.zeros((1, KEYS), tl.float32)
        if GATED:
            of_keys = load_rows(k_codes + group * m * D, keys, listed, D, PADDED_C)
            found = estimate(codes, units, of_keys, load_units(k_units, group, m, keys, listed, PER_KEY), step)
            keep = open_gate(found, best, unit, theta, keys, keep, always_keep)
            difference = (best[:, None] - found) / unit[:, None]
        elif SLOPE:
            difference = tl.load(differences + first + at + tl.arange(0, KEYS), mask=listed, other=0)[None, :]
        gathered = load_rows(k + group * m * D, keys, listed, D, PADDED)
        values = load_rows(v + group * m * DV, keys, listed, DV, PADDED_V)
        of_scores, weights, more = differentiate(
            queries, gathered, values, grads, keep, difference, keys, row, unit,
            theta, tau, grad_kept, always_keep, scale,
            TAIL, SLOPE, SPREAD, INTO_SCORES, PRECISION, UPCAST,
        )  # fmt: skip
        of_threshold += more
        of_queries += multiply(of_scores, gathered, PRECISION, UPCAST)
        if not TILES:
            to_keys = multiply(tl.trans(of_scores), queries, PRECISION, UPCAST) * scale
            to_values = multiply(tl.trans(weights), grads, PRECISION, UPCAST)
            add_rows(grad_k + group * m * D, keys, listed, to_keys, D, PADDED)
            add_rows(grad_v + group * m * DV, keys, listed, to_values, DV, PADDED_V)
    store_rows(grad_q + group * n * D, rows, valid, of_queries * scale, D, PADDED)
    if SLOPE:
        tl.store(grad_threshold + tl.program_id(0), of_threshold)


@triton.jit
def add_rows(base, rows, valid, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Add to vectors of WIDTH numbers that other programs may add to at the same time."""
    columns = tl.arange(0, PADDED)
    places = base + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.atomic_add(places, x, mask=valid[:, None] & (columns < WIDTH)[None, :], sem="relaxed")


@triton.jit
def back_tiles(
    q, k, v, grad, threshold, tau_in, top, total, inner, tail, share, mean, scale,
    index, starts, counts, shown_q, shown_k, q_codes, q_units, k_codes, k_units, best_in, unit_in,
    grad_k, grad_v, n, m, shift, tiles, always_keep, step,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr, PADDED_C: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr, SPREAD: tl.constexpr,
    TAIL: tl.constexpr, SLOPE: tl.constexpr, INTO_SCORES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and of its values, from the listed tiles of ROWS rows that read it."""
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles).to(tl.int64)
    keys = tile * KEYS + tl.arange(0, KEYS)
    exists = keys < m
    shown_keys = find_shown(shown_k, group, m, keys, exists, HIDES_K)
    gathered = load_rows(k + group * m * D, keys, exists, D, PADDED)
    values = load_rows(v + group * m * DV, keys, exists, DV, PADDED_V)
    of_keys = load_rows(k_codes + group * m * D, keys, exists, D, PADDED_C)
    k_unit = load_units(k_units, group, m, keys, exists, PER_KEY)
    theta = tl.load(threshold + group)
    tau = 1.0
    if SLOPE:
        tau = tl.load(tau_in)
    first = tl.load(starts + group * tiles + tile)
    entries = tl.load(counts + group * tiles + tile)
    to_keys = tl.zeros((KEYS, PADDED), tl.float32)
    to_values = tl.zeros((KEYS, PADDED_V), tl.float32)
    for at in range(entries):
        rows = tl.load(index + first + at) * ROWS + tl.arange(0, ROWS)
        valid = rows < n
        shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
        queries = load_rows(q + group * n * D, rows, valid, D, PADDED)
        grads = load_rows(grad + group * n * DV, rows, valid, DV, PADDED_V)
        row = load_row(top, total, inner, tail, share, mean, group * n + rows, valid, TAIL)
        codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED_C)
        units = tl.load(q_units + group * n + rows, mask=valid, other=0)
        best = tl.load(best_in + group * n + rows, mask=valid, other=0)
        unit = tl.full((ROWS,), 1, tl.float32)
        if SPREAD:
            unit = tl.load(unit_in + group * n + rows, mask=valid, other=1)
        found = estimate(codes, units, of_keys, k_unit, step)
        keep = find_visible(rows, shown, keys, shown_keys, shift, CAUSAL)
        keep = open_gate(found, best, unit, theta, keys, keep, always_keep)
        difference = (best[:, None] - found) / unit[:, None]
        of_scores, weights, _ = differentiate(
            queries, gathered, values, grads, keep, difference, keys, row, unit,
            theta, tau, 0.0, always_keep, scale,
            TAIL, SLOPE and INTO_SCORES, SPREAD, INTO_SCORES, PRECISION, UPCAST,
        )  # fmt: skip
        to_keys += multiply(tl.trans(of_scores), queries, PRECISION, UPCAST)
        to_values += multiply(tl.trans(weights), grads, PRECISION, UPCAST)
    store_rows(grad_k + group * m * D, keys, exists, to_keys * scale, D, PADDED)
    store_rows(grad_v + group * m * DV, keys, exists, to_values, DV, PADDED_V)
