"""Random-hyperplane hashes: each bit of a code says on which side of a random plane a vector lies.

Two vectors at angle a share a bit with probability p = 1 - a / pi, and a code of `bits` independent bits with
probability p^bits. The Hadamard hash is faster. Its directions are orthogonal instead of independent, so its codes
agree slightly less often.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.shared.functional import normalize_vectors

EDGE = 1e-6  # the slope of the collision probability is constant closer than this to +-1
MAX_BITS = 15  # codes are kept as int16
AT_A_TIME = 2**21  # projections in memory at a time
ON_CPU = 2**19  # the same on a CPU, small enough for its cache
Pack = Callable[[Tensor, int], Tensor]


def compute_gaussian_codes(
    x: Float[Tensor, "g n d"], directions: Float[Tensor, "m bits d"], pack: Pack | None = None
) -> Int[Tensor, "m g n"]:
    """Compute the codes of tokens for m hashes of independent Gaussian directions; `pack` turns signs into codes."""
    m, bits = directions.shape[:2]
    if bits == 0:
        return x.new_zeros(m, *x.shape[:2], dtype=torch.int16)
    planes = directions.to(x.dtype).flatten(0, 1).mT
    number = max((ON_CPU if x.device.type == "cpu" else AT_A_TIME) // planes.shape[1], 1)
    room = x.new_empty(number, planes.shape[1])
    parts = map(normalize_vectors, x.flatten(0, 1).split(number))  # length does not change a side, but might overflow
    signed = (torch.mm(part, planes, out=room[: len(part)]) for part in parts)
    return torch.cat([(pack or pack_signs)(part, bits) for part in signed], 1).unflatten(1, x.shape[:2])


def compute_hadamard_codes(
    x: Float[Tensor, "g n d"], signs: Float[Tensor, "parts three p"], hashes: int, bits: int, pack: Pack | None = None
) -> Int[Tensor, "m g n"]:
    """Compute codes from the signs of H S3 H S2 H S1 x, with H the Walsh-Hadamard matrix and S random signs.

    A part yields p // bits codes; zeros pad d to p, a power of two.
    """
    width = signs.shape[-1]
    x = F.pad(normalize_vectors(x), (0, width - x.shape[-1]))
    codes = []
    for part in signs.to(x.dtype):
        y = x
        for sign in part:
            y = walsh_hadamard(y * sign)
        codes.append((pack or pack_signs)(y[..., : width // bits * bits].flatten(0, 1), bits))
    return torch.cat(codes)[:hashes].unflatten(1, x.shape[:2])


def pack_signs(y: Float[Tensor, "n signs"], bits: int) -> Int[Tensor, "m n"]:
    """Pack each `bits` signs of a row into a code, lowest bit first."""
    place = 2.0 ** torch.arange(bits, dtype=y.dtype, device=y.device)
    return ((y > 0).to(y.dtype).unflatten(-1, (-1, bits)) @ place).mT.to(torch.int16)


def walsh_hadamard(x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch p"]:
    """Multiply by the unnormalised Walsh-Hadamard matrix in p log p additions; p is a power of two."""
    width = x.shape[-1]
    for step in range(width.bit_length() - 1):
        pairs = x.unflatten(-1, (-1, 2, 2**step))
        top, bottom = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([top + bottom, top - bottom], -2).flatten(-3)
    return x


def find_hadamard_width(dim: int) -> int:
    """Find the power of two to which a vector of width `dim` is padded."""
    return 1 << math.ceil(math.log2(max(dim, 2)))


def collision_probability(cosine: Tensor, bits: int) -> Tensor:
    """Compute (1 - arccos(x) / pi)^bits."""
    return (1 - cosine.arccos() / math.pi) ** bits


def collision_slope(cosine: Tensor, bits: int) -> Tensor:
    """Compute the derivative of the collision probability, cut off where |x| > 1 - EDGE."""
    if bits == 0:
        return torch.zeros_like(cosine)
    x = cosine.clamp(EDGE - 1, 1 - EDGE)
    return bits * (1 - x.arccos() / math.pi) ** (bits - 1) / (math.pi * (1 - x * x).sqrt())
