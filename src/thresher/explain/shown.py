"""What an example looks like to a person: a picture cut into patches, or the text of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from thresher.attention.base import Pattern

EXTRA = 16  # tokens before the patches, at most: classes, registers


class Data(Protocol):
    """Data that can say what their inputs are: images by `pictures`, token ids by `symbols`."""

    class_names: Sequence[str]

    def test_dataloader(self) -> Any: ...


@dataclass
class Shown:
    """An example.

    Attributes:
        picture: Pixels, uint8 [h, w, c], of an image.
        grid: Rows and columns of its patches, where the network has such.
        texts: What each token stands for, for each input that consists of tokens.
    """

    picture: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    texts: list[list[str]] = field(default_factory=list)

    def side(self, count: int, *, last: bool) -> dict[str, int] | None:
        """Say which part of the example `count` tokens of a layer are; None where that is not known.

        Args:
            count: Queries or keys of the layer.
            last: Whether the last of several inputs is meant where they are as long as each other.

        Returns:
            `input`, the place among the inputs, and `extra`, the tokens that come before it.
        """
        lengths = [self.grid[0] * self.grid[1]] if self.grid else [len(text) for text in self.texts]
        extra = EXTRA if self.grid else 0
        found = [{"input": i, "extra": count - n} for i, n in enumerate(lengths) if 0 <= count - n <= extra]
        return (found[-1] if last else found[0]) if found else None


def shown_example(data: Any, net: nn.Module, inputs: Any) -> Shown:
    """Describe a batch of one example.

    Args:
        data: Where it comes from.
        net: The network, which may say into how many patches it cuts images.
        inputs: What the network takes: images, token ids, or a pair of the latter.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        sizes: list[Any] = [getattr(module, "grid_size", None) for module in net.modules()]
        grids = [tuple(size) for size in sizes if isinstance(size, (tuple, list)) and len(size) == 2]
        return Shown(data.pictures(inputs)[0].cpu().numpy(), grids[0] if grids else None)
    parts = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return Shown(texts=[data.symbols(part[0].tolist()) for part in parts])


def sides(shown: Shown, pattern: Pattern, n: int, m: int) -> tuple[dict[str, int] | None, dict[str, int] | None]:
    """Return which parts of an example the queries and the keys of a layer are."""
    return shown.side(n, last=pattern.cross or pattern.causal), shown.side(m, last=pattern.causal and not pattern.cross)
