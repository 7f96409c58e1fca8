"""Labelled images, loaded a batch at a time."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Integer, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]


@runtime_checkable
class Source(Protocol):
    """A source of labelled images.

    Attributes:
        labels: The class of each image, from 0.
        origin: A file, a folder, or a description for people.
    """

    labels: Int64[Tensor, " n"]
    origin: object

    def load(self, indices: Int64[Tensor, " b"]) -> Any:
        """Load the images at `indices`, as the first transform takes them."""


class StoredImages:
    """Images of one size, held in memory.

    Args:
        images: The pixels.
        labels: Class of each image, from 0.
        classes: Number of classes.
        origin: A file, a folder, or a description.

    Raises:
        ValueError: There are no images, another number of labels, or a label out of range.
    """

    def __init__(
        self, images: UInt8[Tensor, "n c h w"], labels: Integer[Tensor, " m"], *, classes: int, origin: object
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{origin} holds {len(images)} images but {len(labels)} labels")
        if len(images) == 0:
            raise ValueError(f"{origin} holds no images")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"{origin} has labels from {lowest} to {highest}; {classes} classes go from 0 to {classes - 1}"
            )
        self.images = images
        self.labels = labels.long()
        self.origin = origin

    def load(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Load the images at `indices`."""
        return self.images[indices]


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Some of the images of a source, transformed a batch at a time.

    Transforming a whole batch makes small images cheap: the fixed cost of a torchvision transform is paid once a
    batch. The loader needs `collate_fn=pass_through`.

    Args:
        source: All images.
        indices: The images to use.
        transform: Maps what `source` loads to the images of a batch.
    """

    def __init__(self, source: Source, indices: Int64[Tensor, " n"], transform: nn.Module) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        indices = self.indices[torch.as_tensor(positions)]
        return self.transform(self.source.load(indices)), self.source.labels[indices]


def pass_through(batch: Any) -> Any:
    """Return a batch unchanged: it was collated when it was loaded."""
    return batch
