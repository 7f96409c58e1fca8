"""The forward pass: rows attend to the listed keys of their block, or to the listed tiles of keys.

A block of `size` rows has its own list; `parts` programs of ROWS rows read it. Entries of a list are keys, KEYS of
which are gathered at a time, or with TILES the numbers of tiles of KEYS keys in order. With GATED rows drop those keys
of the list that they did not choose themselves. Programs are in one dimension, groups last.
"""

import triton
import triton.language as tl

from thresher.kernels.triton.pieces import (
    estimate,
    find_shown,
    find_visible,
    load_rows,
    load_units,
    multiply,
    open_gate,
    store_rows,
)


@triton.jit
def attend_lists(
    q, k, v, threshold, value_trace, factor, score_total, value_total, seen, scale,
    index, starts, counts, shown_q, shown_k, q_codes, q_units, k_codes, k_units, best_in, unit_in,
    out, top_out, total_out, kept_out, computed_out, visited_out, trace_out, dropped_out, mean_out, tail_out,
    n, m, shift, size, blocks, parts, always_keep, step,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr, PADDED_C: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr, CAUSAL: tl.constexpr,
    HIDES_Q: tl.constexpr, HIDES_K: tl.constexpr, PER_KEY: tl.constexpr, SPREAD: tl.constexpr,
    TAIL: tl.constexpr, RUNNING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute outputs, row statistics for backward, counts of pairs, and the number of visited tiles.

    Without a tail, rows have the sum of the traces of their kept values, 0 or NaN.
    With RUNNING, the sums of visible values, [groups, n, DV], differ from row to row; otherwise they are [groups, DV].
    """
    part = tl.program_id(0) % parts
    block = (tl.program_id(0) // parts) % blocks
    group = (tl.program_id(0) // parts // blocks).to(tl.int64)
    within = part * ROWS + tl.arange(0, ROWS)
    rows = block * size + within
    valid = (within < size) & (rows < n)
    shown = find_shown(shown_q, group, n, rows, valid, HIDES_Q)
    queries = load_rows(q + group * n * D, rows, valid, D, PADDED)
    if GATED:
        theta = tl.load(threshold + group)
        codes = load_rows(q_codes + group * n * D, rows, valid, D, PADDED_C)
        units = tl.load(q_units + group * n + rows, mask=valid, other=0)
        best = tl.load(best_in + group * n + rows, mask=valid, other=0)
        unit = tl.full((ROWS,), 1, tl.float32)
        if SPREAD:
            unit = tl.load(unit_in + group * n + rows, mask=valid, other=1)
    first = tl.load(starts + group * blocks + block)
    entries = tl.load(counts + group * blocks + block)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, PADDED_V), tl.float32)
    kept = tl.zeros((ROWS,), tl.int32)
    computed = tl.zeros((ROWS,), tl.int32)
    kept_scores = tl.zeros((ROWS,), tl.float32)
    kept_values = tl.zeros((ROWS, PADDED_V), tl.float32)
    trace = tl.zeros((ROWS,), tl.float32)
    visited = 0
    for at in range(0, entries, 1 if TILES else KEYS):
        if TILES:
            keys = tl.load(index + first + at) * KEYS + tl.arange(0, KEYS)
            listed = keys < m
        else:
            listed = at + tl.arange(0, KEYS) < entries
            keys = tl.load(index + first + at + tl.arange(0, KEYS), mask=listed, other=0)
        visible = find_visible(rows, shown, keys, find_shown(shown_k, group, m, keys, listed, HIDES_K), shift, CAUSAL)
        keep = visible
        if GATED:
            of_keys = load_rows(k_codes + group * m * D, keys, listed, D, PADDED_C)
            found = estimate(codes, units, of_keys, load_units(k_units, group, m, keys, listed, PER_KEY), step)
            keep = open_gate(found, best, unit, theta, keys, visible, always_keep)
        gathered = load_rows(k + group * m * D, keys, listed, D, PADDED)
        values = load_rows(v + group * m * DV, keys, listed, DV, PADDED_V)
        scores = multiply(queries, tl.trans(gathered), PRECISION, UPCAST) * scale
        higher = tl.maximum(top, tl.max(tl.where(keep, scores, float("-inf")), 1))
        level = tl.where(higher == float("-inf"), 0, higher)
        shrink = tl.exp(top - level)
        weights = tl.where(keep, tl.exp(scores - level[:, None]), 0)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + multiply(weights, values, PRECISION, UPCAST)
        if TAIL:
            kept_scores += tl.sum(tl.where(keep, scores, 0), 1)
            kept_values += multiply(keep.to(tl.float32), values, PRECISION, UPCAST)
        else:
            of_values = tl.load(value_trace + group * m + keys, mask=listed, other=0)
            trace += tl.sum(tl.where(keep, of_values[None, :], 0), 1)
        kept += tl.sum(keep.to(tl.int32), 1)
        computed += tl.sum(visible.to(tl.int32), 1)
        top = higher
        visited += 1
    top = tl.where(top == float("-inf"), 0, top)
    if TAIL:
        dropped = tl.load(seen + group * n + rows, mask=valid, other=0) - kept
        some = dropped > 0
        mean = tl.load(score_total + group * n + rows, mask=valid, other=0) - kept_scores
        mean = mean / tl.maximum(dropped, 1).to(tl.float32)
        tail = tl.where(some, tl.exp(tl.minimum(mean - top, 30.0)), 0)
        weight = tail * tl.load(factor + group)
        total += weight * dropped.to(tl.float32)
        if RUNNING:
            of_all = load_rows(value_total + group * n * DV, rows, valid, DV, PADDED_V)
        else:
            of_all = load_rows(value_total + group * DV, tl.zeros((ROWS,), tl.int32), valid, DV, PADDED_V)
        of_dropped = of_all - kept_values
        summed += weight[:, None] * of_dropped
        store_rows(dropped_out + group * n * DV, rows, valid, of_dropped, DV, PADDED_V)
        tl.store(mean_out + group * n + rows, mean, mask=valid)
        tl.store(tail_out + group * n + rows, tail, mask=valid)
    else:
        tl.store(trace_out + group * n + rows, trace, mask=valid)
    total = tl.where(total > 0, total, 1)
    store_rows(out + group * n * DV, rows, valid, summed / total[:, None], DV, PADDED_V)
    tl.store(top_out + group * n + rows, top, mask=valid)
    tl.store(total_out + group * n + rows, total, mask=valid)
    tl.store(kept_out + group * n + rows, kept, mask=valid)
    tl.store(computed_out + group * n + rows, computed, mask=valid)
    tl.store(visited_out + tl.program_id(0), visited)
