"""Random-hyperplane hashes: codes of which each bit is the side of a random plane that a vector lies on.

Two vectors at angle a get the same bit with probability 1 - a / pi, and the same code of `bits` independent bits with
that to the power of `bits`. The Hadamard hash is faster, and its bits are orthogonal in place of independent: its codes
agree a little less often.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.functional import unit_vectors

MAX_BITS = 15  # codes are kept as int16
AT_A_TIME = 2**21  # projections in memory
ON_CPU = 2**19  # the same, where they then stay in its cache until they are read
Pack = Callable[[Tensor, int], Tensor]


def gaussian_codes(
    x: Float[Tensor, "g n d"], directions: Float[Tensor, "m bits d"], pack: Pack | None = None
) -> Int[Tensor, "m g n"]:
    """Return the codes of all tokens for m hashes of independent Gaussian directions; `pack` reads signs as numbers."""
    m, bits = directions.shape[:2]
    if bits == 0:
        return x.new_zeros(m, *x.shape[:2], dtype=torch.int16)
    planes = directions.to(x.dtype).flatten(0, 1).mT
    number = max((ON_CPU if x.device.type == "cpu" else AT_A_TIME) // planes.shape[1], 1)
    room = x.new_empty(number, planes.shape[1])
    parts = map(unit_vectors, x.flatten(0, 1).split(number))  # sides do not depend on length, but it might overflow
    signed = (torch.mm(part, planes, out=room[: len(part)]) for part in parts)
    return torch.cat([(pack or pack_signs)(part, bits) for part in signed], 1).unflatten(1, x.shape[:2])


def hadamard_codes(
    x: Float[Tensor, "g n d"], signs: Float[Tensor, "parts three p"], hashes: int, bits: int, pack: Pack | None = None
) -> Int[Tensor, "m g n"]:
    """Return codes cut from the signs of H S3 H S2 H S1 x, H the Walsh-Hadamard matrix, S random signs.

    A part yields p // bits codes; d is filled up with zeros to p, a power of two.
    """
    width = signs.shape[-1]
    x = F.pad(unit_vectors(x), (0, width - x.shape[-1]))
    codes = []
    for part in signs.to(x.dtype):
        y = x
        for sign in part:
            y = walsh_hadamard(y * sign)
        codes.append((pack or pack_signs)(y[..., : width // bits * bits].flatten(0, 1), bits))
    return torch.cat(codes)[:hashes].unflatten(1, x.shape[:2])


def pack_signs(y: Float[Tensor, "n signs"], bits: int) -> Int[Tensor, "m n"]:
    """Read each `bits` signs of a row as a number, the first as its lowest bit."""
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


def hadamard_width(dim: int) -> int:
    """Return the power of two that a vector of `dim` is filled up to."""
    return 1 << math.ceil(math.log2(max(dim, 2)))
