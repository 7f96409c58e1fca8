"""Functions of Triton that the kernels share: loads, products, visible pairs, estimates, the gate and its slope."""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load vectors of WIDTH numbers, [rows, PADDED]; 0 where a row is not valid and beyond WIDTH."""
    columns = tl.arange(0, PADDED)
    places = base + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    return tl.load(places, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0)


@triton.jit
def store_rows(base, rows, valid, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store vectors of WIDTH numbers."""
    columns = tl.arange(0, PADDED)
    places = base + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(places, x, mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply matrices, with sums in fp32; UPCAST is for the interpreter, whose products of bf16 are wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def find_shown(mask, group, length, places, valid, MASKED: tl.constexpr):
    """Find the tokens of a group that are not hidden, of those that are valid."""
    if MASKED:
        return valid & (tl.load(mask + group * length + places, mask=valid, other=0) != 0)
    else:
        return valid


@triton.jit
def find_visible(rows, shown_rows, keys, shown_keys, shift, CAUSAL: tl.constexpr):
    """Find the visible pairs, [rows, keys]."""
    visible = shown_rows[:, None] & shown_keys[None, :]
    if CAUSAL:
        visible = visible & (keys[None, :] <= rows[:, None] + shift)
    return visible


@triton.jit
def load_units(units, group, m, keys, valid, PER_KEY: tl.constexpr):
    """Load the units of the codes of keys, [keys]."""
    if PER_KEY:
        return tl.load(units + group * m + keys, mask=valid, other=0)
    else:
        return tl.load(units + group) + tl.zeros(keys.shape, tl.float32)


@triton.jit
def estimate(q_codes, q_units, k_codes, k_units, step):
    """Estimate scores from the product of codes, whose integers are exact, [rows, keys]."""
    product = tl.dot(q_codes, tl.trans(k_codes), out_dtype=tl.int32)
    return product.to(tl.float32) * step * (q_units[:, None] * k_units[None, :])


@triton.jit
def open_gate(estimates, best, unit, theta, keys, visible, always_keep):
    """Find the kept pairs of rows that choose for themselves."""
    near = best[:, None] - estimates <= (theta * unit)[:, None]
    return visible & (near | (keys < always_keep)[None, :])


@triton.jit
def find_slope(difference, keep, theta, tau, keys, always_keep):
    """Find the slope of the gate of kept pairs, the step "inside"; 0 for all others."""
    margin = tl.maximum((theta - difference) / tau, 0) / 3
    slope = (1 - tl.minimum(margin * margin, 1)) / (2 * tau)
    return tl.where(keep & (keys >= always_keep)[None, :], slope, 0)
