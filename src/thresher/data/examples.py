"""Labelled images, delivered to the loader by the batch."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Integer, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]


@runtime_checkable
class Source(Protocol):
    """Where labelled images come from."""

    labels: Int64[Tensor, " n"]

    def load(self, indices: Int64[Tensor, " b"]) -> Any:
        """Return the images at `indices`, in the form in which the first transform takes them."""


class StoredImages:
    """Images of one size, held in memory.

    Args:
        images: The pixels.
        labels: Class of each image, counted from 0.
        classes: Number of classes.
        origin: File or folder that they were read from, for error messages.

    Raises:
        ValueError: There are no images, not as many labels as images, or a label is out of range.
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

    def load(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Return the images at `indices`."""
        return self.images[indices]


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Some of the images of a source, transformed a batch at a time.

    Transforming a whole batch is what makes small images cheap: the fixed cost of a torchvision transform is paid
    once a batch. The loader needs `collate_fn=as_delivered`.

    Args:
        source: All images.
        indices: Those that belong here.
        transform: From what `source` loads to the images of a batch.
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


def as_delivered(batch: Any) -> Any:
    """Return the batch: it was collated when it was loaded."""
    return batch
