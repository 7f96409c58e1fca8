"""Options of YOSO that select its hashes."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from thresher.attention.options import check_choice, check_integer
from thresher.attention.yoso.hashing import MAX_BITS, find_hadamard_width

Kind = Literal["gaussian", "hadamard"]
Resample = Literal["forward", "never"]


@dataclass(frozen=True, kw_only=True)
class HashOptions:
    """How tokens are hashed.

    Attributes:
        kind: "gaussian", independent directions, or "hadamard", faster and slightly biased.
        bits: Length of a code, at most 15; log2 of the number of keys is a good start. More bits sharpen weights.
        resample: Draw new hashes at each "forward" in training, or "never". Evaluation uses those in the state dict.
    """

    kind: Kind = "gaussian"
    bits: int = 6
    resample: Resample = "forward"

    def __post_init__(self) -> None:
        check_choice("hash.kind", self.kind, get_args(Kind))
        check_integer("hash.bits", self.bits, 0, MAX_BITS)
        check_choice("hash.resample", self.resample, get_args(Resample))

    def check_fits(self, head_dim: int) -> None:
        """Check that a code is no longer than a token is wide.

        Raises:
            ValueError: A Hadamard code has too many bits, or none.
        """
        if self.kind == "hadamard" and not 1 <= self.bits <= find_hadamard_width(head_dim):
            raise ValueError(
                f"a hadamard code has 1 .. {find_hadamard_width(head_dim)} bits at head_dim {head_dim}, got {self.bits}"
            )

    def draw(self, hashes: int, head_dim: int) -> Tensor:
        """Draw directions [hashes, bits, d], or the signs of Hadamard products [products, 3, width]."""
        if self.kind == "gaussian":
            return torch.randn(hashes, self.bits, head_dim)
        width = find_hadamard_width(head_dim)
        return torch.randn(self.count_products(hashes, head_dim), 3, width).sign()

    def count_products(self, hashes: int, head_dim: int) -> int:
        """Count the Hadamard products that yield `hashes` hashes."""
        return -(-hashes // (find_hadamard_width(head_dim) // self.bits))

    def count_macs_per_token(self, hashes: int, head_dim: int) -> int:
        """Count the MACs of hashing one token."""
        if self.kind == "gaussian":
            return hashes * self.bits * head_dim
        width = find_hadamard_width(head_dim)
        return self.count_products(hashes, head_dim) * 3 * width * int(math.log2(width))
