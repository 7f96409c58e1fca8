"""Trained offsets, one for each head, that move how many keys the head keeps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn


class HeadOffsets(nn.Module, ABC):
    """One offset for each head: the larger, the more keys the head keeps. A subclass says what the offset is added to.

    Args:
        num_heads: Number of heads.
        trainable: Whether offsets receive gradients.
        unit: Unit of the offsets.
    """

    def __init__(self, num_heads: int, trainable: bool, unit: str) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(num_heads), requires_grad=trainable)
        self.unit = unit

    @abstractmethod
    def values(self) -> Float[Tensor, " h"]:
        """Return what the offsets make of each head, differentiable."""


class KeyFactors(HeadOffsets):
    """The factor of each head's number of keys, 1 at first; offsets are its natural logarithm.

    Args:
        num_heads: Number of heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads, trainable=True, unit="log")

    def values(self) -> Float[Tensor, " h"]:
        return self.offset.exp()


def named_offsets(model: nn.Module) -> Iterator[tuple[str, HeadOffsets]]:
    """Iterate over mechanisms with offsets of their heads: dotted name and offsets."""
    for name, module in model.named_modules():
        if isinstance(module, HeadOffsets):
            yield name.rpartition(".")[0], module


def find_trainable_offsets(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the offsets that are trained, by the dotted name of their mechanism."""
    return {name: each.offset for name, each in named_offsets(model) if each.offset.requires_grad}
