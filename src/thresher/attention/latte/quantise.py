"""Integer codes of queries and keys, and their product, computed from high bits first.

An 8-bit code x splits into x = step * high + low with step = 2^(8 - bits), so that

    x . y = step^2 high.high + step (high.low + low.high) + low.low

holds exactly in integers (with 4 bits: 256 HH + 16 (HL + LH) + LL). The first term estimates the product. The other
three complete it and are needed only for the pairs that the estimate keeps.

Codes are integers in floating point: fp32 sums are exact up to 2^24, which suffices up to head_dim 1024.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Split = Literal["round", "truncate"]


class Halves(NamedTuple):
    """High and low parts of codes, x = step * high + low."""

    high: Float[Tensor, "*shape"]
    low: Float[Tensor, "*shape"]
    step: int


def quantise(
    x: Float[Tensor, "b h n d"], per_token: bool
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h #n 1"]]:
    """Quantise symmetrically to 8 bits; return integer codes in [-127, 127] and their scale.

    Args:
        x: Queries or keys; hidden tokens must be zero, so that they do not change the scale.
        per_token: One scale for each token instead of one for each example and head. A shared scale depends on every
            token, so causal attention needs a scale for each token.
    """
    over = -1 if per_token else (-2, -1)
    scale = x.detach().abs().amax(over, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny * 127) / 127
    return (x.detach() / scale).round().clamp(-127, 127), scale


def split_codes(codes: Tensor, bits: int, rule: Split) -> Halves:
    """Split 8-bit codes into their `bits` most significant bits and the rest.

    `round` takes the nearest multiple of the step, so `low` is signed. `truncate` takes the top bits of two's
    complement, so `low` is not negative, which biases every product by an amount that depends on the key.
    """
    step = 2 ** (8 - bits)
    ratio = codes / step
    high = ratio.round() if rule == "round" else ratio.floor()
    high = high.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Halves(high, codes - step * high, step)


def estimate_product(q: Halves, k: Halves) -> Float[Tensor, "b h n m"]:
    """Estimate the integer product from high bits alone, step^2 high.high."""
    return (q.high * (q.step * k.step)) @ k.high.transpose(-2, -1)


def complete_product(estimate: Tensor, q: Halves, k: Halves) -> Float[Tensor, "b h n m"]:
    """Add the three missing terms to an estimate; the result is the exact product of the 8-bit codes."""
    high_low = (q.high * q.step) @ k.low.transpose(-2, -1)
    low_any = q.low @ (k.high * k.step + k.low).transpose(-2, -1)
    return estimate + high_low + low_any
