"""A part of Fashion-MNIST that ships with the package: 10,000 training and 2,000 test images."""

import zipfile
import zlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
import torch
from torchvision import datasets

from thresher.data.examples import StoredImages
from thresher.data.images import ImageData


class FashionMNIST12k(ImageData):
    """Ten classes of clothes with equally many images, 28x28 grey pixels; needs no download.

    All hyper-parameters are those of `ImageData`.
    """

    classes = tuple(datasets.FashionMNIST.classes)
    channels = 1
    mean = (0.2840,)
    std = (0.3513,)
    native_size = 28

    def __init__(
        self,
        *,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        augment: str = "none",
        erase: float = 0.0,
        image_size: int | Sequence[int] = 28,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            val_fraction=val_fraction,
            limit_train=limit_train,
            augment=augment,
            erase=erase,
            image_size=image_size,
        )

    def read_train(self) -> StoredImages:
        """Read the 10,000 training images."""
        return self._read("train")

    def read_test(self) -> StoredImages:
        """Read the 2,000 test images."""
        return self._read("test")

    def _read(self, split: str) -> StoredImages:
        archive = find_archive()
        try:
            with archive.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                # numpy decompresses only the arrays of this split
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{archive} is missing from the installation; install thresher again") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{archive} is damaged ({error}); install thresher again") from error
        return StoredImages(
            torch.from_numpy(images)[:, None],
            torch.from_numpy(labels),
            classes=self.num_classes,
            origin=f"{archive.name}, which ships with the package",
        )


def find_archive() -> Traversable:
    """Find the file of the images."""
    return files("thresher.data") / "files" / "fashion_mnist_12k.npz"
