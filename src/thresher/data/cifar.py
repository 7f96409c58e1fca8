"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images."""

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url

from thresher.data.archives import read_arrays, unpack
from thresher.data.examples import StoredImages
from thresher.data.images import ImageData

HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class CIFAR10(ImageData):
    """Ten classes of animals and vehicles, 32x32 colour pixels.

    The other hyper-parameters are those of `ImageData`.

    Args:
        root: Folder that holds the unpacked folder of the data set.
        download: Download and unpack it if it is not there.
    """

    published: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    archive_sha256: ClassVar[str] = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    label_key: ClassVar[str] = "labels"
    classes: Sequence[str] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    channels = 3
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    native_size = 32

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
        augment: str = "crop_flip",
        erase: float = 0.0,
        image_size: int | Sequence[int] = 32,
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
        """Download and unpack missing files, if `download` is set.

        Raises:
            FileNotFoundError: The download failed.
        """
        lists = self.published.train_list + self.published.test_list
        if not self.download or all(check_integrity(self._folder / name, md5) for name, md5 in lists):
            return
        source = self.published
        try:
            download_url(source.url, self.root, filename=source.filename, md5=source.tgz_md5)
            wanted = {f"{source.base_folder}/{name}": self._folder / name for name, _ in lists}
            unpack(self.root / source.filename, self.archive_sha256, wanted)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            where = self.root.resolve()
            raise FileNotFoundError(f"could not download {source.url} to {where}: {error}. {self._how_to}") from error

    def read_train(self) -> StoredImages:
        """Read the training images."""
        return self._read(self.published.train_list)

    def read_test(self) -> StoredImages:
        """Read the test images."""
        return self._read(self.published.test_list)

    @property
    def _folder(self) -> Path:
        return Path(self.root, self.published.base_folder)

    @property
    def _how_to(self) -> str:
        source = self.published
        return (
            f"With a network set data.download=true; without one put {source.filename} "
            f"({source.url}) into {self.root.resolve()} and set data.download=true, which then only unpacks it."
        )

    def _read(self, listed: list[list[str]]) -> StoredImages:
        # torchvision's data set would also open the test file for the training images
        for name, _ in listed:
            if not (self._folder / name).is_file():
                raise FileNotFoundError(f"there is no {name} in {self._folder.resolve()}. {self._how_to}")
        images, labels = [], []
        for name, md5 in listed:
            path = self._folder / name
            content = path.read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"{path} is damaged (its MD5 is not {md5}); delete it. {self._how_to}")
            entry = read_arrays(content, path)
            images.append(entry["data"])
            labels += entry[self.label_key]
        pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
        return StoredImages(pixels, torch.tensor(labels), classes=self.num_classes, origin=self._folder)


class CIFAR100(CIFAR10):
    """A hundred classes of objects, 32x32 colour pixels; hyper-parameters as for `CIFAR10`."""

    published = datasets.CIFAR100
    archive_sha256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
    label_key = "fine_labels"
    classes = tuple(HUNDRED.split())
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
