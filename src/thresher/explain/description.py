"""Describe an example for people: a picture cut into patches, or the text of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from thresher.attention.contract import Pattern

MAX_EXTRA = 16  # tokens before the patches: classes, registers


class DescribableData(Protocol):
    """Data that show their inputs: images by `restore_pixels`, token ids by `symbols`."""

    class_names: Sequence[str]

    def test_dataloader(self) -> Any: ...


@dataclass
class Description:
    """A readable description of an example.

    Attributes:
        picture: Pixels of an image, uint8 [h, w, c].
        grid: Rows and columns of patches, if the network has them.
        texts: Text of each token, for each input of tokens.
    """

    picture: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    texts: list[list[str]] = field(default_factory=list)

    def find_side(self, count: int, *, last: bool) -> dict[str, int] | None:
        """Find the input that the `count` tokens of a layer represent; None if unknown.

        Args:
            count: Queries or keys of the layer.
            last: Whether to prefer the last of several inputs of equal length.

        Returns:
            `input`, the index of the input, and `extra`, the number of tokens before it.
        """
        lengths = [self.grid[0] * self.grid[1]] if self.grid else [len(text) for text in self.texts]
        extra = MAX_EXTRA if self.grid else 0
        found = [{"input": i, "extra": count - n} for i, n in enumerate(lengths) if 0 <= count - n <= extra]
        return (found[-1] if last else found[0]) if found else None


def describe_example(data: Any, net: nn.Module, inputs: Any) -> Description:
    """Describe a batch of one example.

    Args:
        data: Source of the example.
        net: The network, which may know its grid of patches.
        inputs: Inputs of the network: images, token ids, or a pair of token ids.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        sizes: list[Any] = [getattr(module, "grid_size", None) for module in net.modules()]
        grids = [tuple(size) for size in sizes if isinstance(size, (tuple, list)) and len(size) == 2]
        return Description(data.restore_pixels(inputs)[0].cpu().numpy(), grids[0] if grids else None)
    parts = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return Description(texts=[data.symbols(part[0].tolist()) for part in parts])


def find_sides(
    description: Description, pattern: Pattern, n: int, m: int
) -> tuple[dict[str, int] | None, dict[str, int] | None]:
    """Find the inputs that the queries and the keys of a layer represent."""
    queries = description.find_side(n, last=pattern.cross or pattern.causal)
    return queries, description.find_side(m, last=pattern.causal and not pattern.cross)
