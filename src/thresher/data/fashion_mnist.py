"""Fashion-MNIST (arXiv 1708.07747), whole: 60,000 training and 10,000 test images."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from thresher.data.examples import StoredImages
from thresher.data.images import ImageData

HOW_TO_GET = (
    "With a network set data.download=true. On Debian run `apt-get download dataset-fashion-mnist` and "
    "`dpkg-deb -x dataset-fashion-mnist_*.deb unpacked`, then set "
    "data.root=unpacked/usr/share/datasets/fashion-mnist. data=fashion_mnist_12k needs neither."
)


class FashionMNIST(ImageData):
    """Ten classes of clothes, 28x28 grey pixels.

    The other hyper-parameters are those of `ImageData`.

    Args:
        root: Folder of the idx files, plain or gzipped, directly or in FashionMNIST/raw (torchvision's layout).
        download: Download missing files.
    """

    classes = tuple(datasets.FashionMNIST.classes)
    channels = 1
    mean = (0.2860,)
    std = (0.3530,)
    native_size = 28

    def __init__(
        self,
        *,
        root: str | Path = "data",
        download: bool = False,
        batch_size: int = 128,
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
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Download missing files, if `download` is set.

        Raises:
            FileNotFoundError: The download failed.
        """
        names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        if not self.download or all(self._list_present(f"{name}-ubyte") for name in names):
            return
        try:
            datasets.FashionMNIST(self.root, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise FileNotFoundError(f"could not download Fashion-MNIST to {self.root.resolve()}: {error}") from error

    def read_train(self) -> StoredImages:
        """Read the training images."""
        return self._read("train")

    def read_test(self) -> StoredImages:
        """Read the test images."""
        return self._read("t10k")

    def _read(self, split: str) -> StoredImages:
        path = self._find(f"{split}-images-idx3-ubyte")
        images = read_idx(path, dimensions=3)
        if images.shape[1:] != (self.native_size, self.native_size):
            raise ValueError(f"{path} holds images of {tuple(images.shape[1:])} pixels; Fashion-MNIST has (28, 28)")
        labels = read_idx(self._find(f"{split}-labels-idx1-ubyte"), dimensions=1)
        return StoredImages(images[:, None], labels, classes=self.num_classes, origin=path)

    def _list_present(self, name: str) -> list[Path]:
        folders = (self.root / "FashionMNIST" / "raw", self.root)
        return [path for folder in folders for path in (folder / name, folder / f"{name}.gz") if path.is_file()]

    def _find(self, name: str) -> Path:
        present = self._list_present(name)
        if not present:
            raise FileNotFoundError(
                f"there is no {name} (nor {name}.gz) in {self.root.resolve()} or its FashionMNIST/raw. {HOW_TO_GET}"
            )
        return present[0]


def read_idx(path: Path, *, dimensions: int) -> UInt8[Tensor, "..."]:
    """Read an array of bytes in the idx format, gzipped if the name ends in .gz.

    torchvision's reader takes plain files only, and its errors do not name the file.

    Args:
        path: The file.
        dimensions: Number of dimensions that the array must have.

    Raises:
        ValueError: The file is damaged or of another kind.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it. {HOW_TO_GET}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is not an idx file of bytes in {dimensions} dimensions; delete it. {HOW_TO_GET}")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        missing = f"{len(data) - start} bytes of pixels or labels where its header says {math.prod(shape)}"
        raise ValueError(f"{path} is damaged ({missing}); delete it. {HOW_TO_GET}")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)
