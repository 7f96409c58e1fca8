"""Any directory with one folder of images for each class."""

import logging
import os
from pathlib import Path

import torch
from jaxtyping import Int64
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from thresher.data.examples import Source
from thresher.data.images import ImageData, seeded_order

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_log = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """Images in folders named after their classes.

    Two layouts are understood. `root/<class>/...`: the share `val_fraction` of all images becomes the test set, the
    same share of the rest the validation set, drawn by `seed`. `root/train/<class>/...`, with `root/val` (or
    `root/valid`) and `root/test` beside it in the same form: without a val folder, validation images are held out
    from the training images; without a test folder, there is no test. Folders of a class may hold further folders;
    hidden files and those that are no images by their extension are left alone.

    Images are delivered as RGB. Evaluation resizes the shorter side to 8/7 of `image_size` and crops the centre, and so
    does training with augment=none; the other augmentations crop at random scale and place and flip.
    The other hyper-parameters are those of `ImageData`.

    Args:
        root: The directory.
    """

    channels = 3
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    native_size = 224

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        augment: str = "crop_flip",
        erase: float = 0.0,
        image_size: int = 224,
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

    def setup(self, stage: str) -> None:
        """List the files that `stage` needs; they are opened when a batch asks for them."""
        if not self.classes:
            folder = self.root / "train" if self._has_splits() else self.root
            self.classes = _checked_classes(folder)
        super().setup(stage)

    def read_train(self) -> Source:
        """List the training images, with those of validation where these have no folder."""
        if self._has_splits():
            return self._list(self.root / "train")
        return self._divide()[0]

    def read_val(self) -> Source | None:
        """List the images of the val folder, if there is one."""
        present = [self.root / name for name in ("val", "valid") if (self.root / name).is_dir()]
        if not self._has_splits() or not present:
            return None
        if len(present) > 1:
            raise ValueError(f"{self.root} has both val and valid; keep one of them")
        _log.info("validation images come from %s; val_fraction is not used", present[0])
        return self._list(present[0])

    def read_test(self) -> Source:
        """List the test images.

        Raises:
            FileNotFoundError: There is a train folder but no test folder.
        """
        if not self._has_splits():
            return self._divide()[1]
        if not (self.root / "test").is_dir():
            raise FileNotFoundError(f"{self.root} has a train folder but no test folder; put test images there")
        return self._list(self.root / "test")

    def frame(self, *, augment: bool) -> nn.Module:
        """Return the transform that cuts images of any size to `image_size`."""
        size = self.image_size
        steps: list[nn.Module] = (
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            if augment
            else [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
        )
        return Frame(nn.Sequential(*steps, v2.PILToTensor()))

    def _has_splits(self) -> bool:
        """Tell the two layouts apart; a folder `train` that holds images itself is a class called train."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.root.resolve()}; set data.root to one that holds a folder for each class"
            )
        return bool(_class_folders(self.root / "train"))

    def _list(self, folder: Path) -> "ImageFiles":
        found = _class_folders(folder)
        if missing := sorted(set(self.classes) - set(found)):
            raise ValueError(f"{folder} lacks classes of the training images: {', '.join(missing)}")
        if unknown := sorted(set(found) - set(self.classes)):
            raise ValueError(f"{folder} has classes that the training images lack: {', '.join(unknown)}")
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            images = _images_below(folder / name)
            if not images:
                raise ValueError(f"{folder / name} holds no image; known extensions: {', '.join(IMG_EXTENSIONS)}")
            paths += images
            labels += [label] * len(images)
        return ImageFiles(paths, torch.tensor(labels))

    def _divide(self) -> tuple["ImageFiles", "ImageFiles"]:
        """Divide the images of the layout without splits into those for training and validation, and for test."""
        listed = self._list(self.root)
        rest, test = self.hold_out(seeded_order(len(listed.labels), self.seed), "test")
        return listed.take(rest), listed.take(test)


class ImageFiles:
    """Images that are read from their files when they are asked for.

    Args:
        paths: The files.
        labels: Class of each, counted from 0.
    """

    def __init__(self, paths: list[Path], labels: Int64[Tensor, " n"]) -> None:
        self.paths = paths
        self.labels = labels

    def take(self, indices: Int64[Tensor, " m"]) -> "ImageFiles":
        """Return some of the images."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.labels[indices])

    def load(self, indices: Int64[Tensor, " b"]) -> list[Image.Image]:
        """Read the images at `indices` as RGB."""
        return [_read_rgb(self.paths[i]) for i in indices.tolist()]


class Frame(nn.Module):
    """Bring images of several sizes to one and stack them.

    Args:
        transform: From one image to a tensor whose size is always the same.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _checked_classes(folder: Path) -> list[str]:
    classes = _class_folders(folder)
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        found = f"only {', '.join(classes)}" if classes else "none"
        raise ValueError(f"{folder} should hold a folder of images for each class; it holds {found}")
    if len(classes) == 1:
        raise ValueError(f"{folder} has a single class, {classes[0]}; classification needs two or more")
    return classes


def _images_below(folder: Path) -> list[Path]:
    paths = [Path(base, name) for base, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith("."))


def _read_rgb(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); repair or remove it") from error
