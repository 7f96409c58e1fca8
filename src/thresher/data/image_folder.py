"""Image classification from any directory with a folder for each class."""

from collections import ChainMap, Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from thresher.data.augmentation import CentreCrop
from thresher.data.examples import Source
from thresher.data.image_listing import Identity, list_folders, list_images
from thresher.data.image_reading import read_rgb
from thresher.data.images import ImageData, draw_order
from thresher.data.part_names import PART_NAMES
from thresher.data.summary import describe_held_out

ROOM = 8 / 7  # side of the resized image, as a multiple of the crop


class ImageFolder(ImageData):
    """Images in folders named after their classes.

    There are two layouts. `root/<class>/...`: the share `val_fraction` of all images becomes the test set, the
    same share of the rest the validation set, drawn by `seed`. `root/train/<class>/...`, with folders for validation
    and test beside it in the same form, by any name of `PART_NAMES` in upper or lower case: without a folder
    for validation, some training images are held out; without one for the test, there is no test. Folders
    of a class may hold further folders. Links are followed, and each file is read once (see `image_listing.py`).

    Images are RGB, upright, on white where they are transparent (see `image_reading.py`). Evaluation
    resizes them until they cover 8/7 of `image_size` and crops the centre, and so does training with augment=none;
    the other augmentations flip, and crop at a random scale and place.
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
        image_size: int | Sequence[int] = 224,
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
        self._files: dict[str, dict[Identity, Path]] = {}  # by part
        self._divided: tuple[ImageFiles, ImageFiles] | None = None

    def setup(self, stage: str) -> None:
        """List the files that `stage` needs; a batch opens them when it is loaded."""
        if not self.classes:
            parts = self._find_parts()
            self.classes = _check_classes(parts["train"] if parts else self.root)
        super().setup(stage)

    def read_train(self) -> Source:
        """List the training images, including those for validation if these have no folder."""
        parts = self._find_parts()
        if not parts:
            return self._divide()[0]
        listed = self._list(parts["train"], "train")
        beside = list_folders(self.root)
        names = [name for name in beside.folders if self.root / name not in parts.values()]
        self.left_out["train"] += Counter({f"folders beside it ({', '.join(names)})": len(names)}) + beside.left_out
        return listed

    def read_val(self) -> Source | None:
        """List the images of the folder for validation, if there is one."""
        folder = self._find_parts().get("val")
        return None if folder is None else self._list(folder, "val")

    def read_test(self) -> Source:
        """List the test images.

        Raises:
            FileNotFoundError: There is a folder for training but none for the test.
        """
        parts = self._find_parts()
        if not parts:
            return self._divide()[1]
        if "test" not in parts:
            names = " or ".join(PART_NAMES["test"])
            raise FileNotFoundError(
                f"{self.root} has a folder {parts['train'].name} but none for the test ({names}): put test images "
                "there, in folders of classes, or train with test=false"
            )
        return self._list(parts["test"], "test")

    def build_frame(self, *, augment: bool) -> nn.Module:
        """Build the transform that crops images of any size to `image_size`."""
        size = (self.height, self.width)
        if not augment:
            return Frame(nn.Sequential(CentreCrop(size, ROOM), v2.PILToTensor()))
        aspect = self.width / self.height
        crop = v2.RandomResizedCrop(size, ratio=(3 / 4 * aspect, 4 / 3 * aspect))
        return Frame(nn.Sequential(crop, v2.RandomHorizontalFlip(), v2.PILToTensor()))

    def _find_parts(self) -> dict[str, Path]:
        """Find the folders of the parts; none in the layout without parts, where `train` may be a class.

        Raises:
            FileNotFoundError: There is no root.
            ValueError: A part has two folders, or training has none.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.root.resolve()}; set data.root to one that holds a folder for each class"
            )
        named = {
            part: [name for name in list_folders(self.root).folders if name.lower() in names]
            for part, names in PART_NAMES.items()
        }
        divided = {part: [n for n in names if list_folders(self.root / n).folders] for part, names in named.items()}
        if not any(divided.values()):
            return {}
        if not divided["train"]:
            others = ", ".join(name for names in divided.values() for name in names)
            wanted = " or ".join(PART_NAMES["train"])
            raise ValueError(
                f"{self.root} has folders of classes in {others} but none in {wanted}: put the training images there"
            )
        for names in named.values():
            if len(names) > 1:
                raise ValueError(f"{self.root} has both {' and '.join(names)}; keep one of them")
        return {part: self.root / names[0] for part, names in named.items() if names}

    def _list(self, folder: Path, part: str) -> "ImageFiles":
        found = list_folders(folder)
        if not found.folders:
            raise ValueError(f"{folder} holds no folders of classes; put its images into such, or rename it")
        if missing := sorted(set(self.classes) - set(found.folders)):
            raise ValueError(f"{folder} lacks classes of the training images: {', '.join(missing)}")
        if unknown := sorted(set(found.folders) - set(self.classes)):
            raise ValueError(f"{folder} has classes that the training images lack: {', '.join(unknown)}")
        others = ChainMap(*(files for name, files in self._files.items() if name != part))
        listed = list_images(folder, self.classes, others)
        labels = torch.tensor(listed.labels, dtype=torch.int64)
        for label, name in enumerate(self.classes):
            if not (labels == label).any():
                seen = ", ".join(f"{count} {reason}" for reason, count in listed.left_out.items())
                raise ValueError(
                    f"{folder / name} holds no image that can be read" + (f"; left out: {seen}" if seen else "")
                )
        self._files[part] = listed.files
        self.left_out[part] = found.left_out + listed.left_out
        return ImageFiles(listed.paths, labels, folder)

    def _divide(self) -> tuple["ImageFiles", "ImageFiles"]:
        """Divide images of the layout without parts: for training and validation, and for the test."""
        if self._divided is not None:
            return self._divided
        listed = self._list(self.root, "train")
        rest, test = self.hold_out(draw_order(len(listed.labels), self.seed), "test")
        self.sources["test"] = describe_held_out(self.val_fraction, self.seed, of="all images")
        self._divided = listed.take(rest), listed.take(test)
        return self._divided


class ImageFiles:
    """Images that are read from their files on demand.

    Args:
        paths: The files.
        labels: Class of each, from 0.
        origin: The folder that holds them.
    """

    def __init__(self, paths: list[Path], labels: Int64[Tensor, " n"], origin: object) -> None:
        self.paths = paths
        self.labels = labels
        self.origin = origin

    def take(self, indices: Int64[Tensor, " m"]) -> "ImageFiles":
        """Select some of the images."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.labels[indices], self.origin)

    def load(self, indices: Int64[Tensor, " b"]) -> list[Image.Image]:
        """Read the images at `indices` as RGB."""
        return [read_rgb(self.paths[i]) for i in indices.tolist()]


class Frame(nn.Module):
    """Crop images to one size and stack them.

    Args:
        transform: Maps an image to a tensor of a fixed size.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def _check_classes(folder: Path) -> list[str]:
    classes = list_folders(folder).folders
    names = {name for names in PART_NAMES.values() for name in names}
    if {name.lower() for name in classes} <= names:
        found = f"only {', '.join(classes)}" if classes else "none"
        raise ValueError(f"{folder} should hold a folder of images for each class; it holds {found}")
    if len(classes) == 1:
        raise ValueError(f"{folder} has a single class, {classes[0]}; classification needs two or more")
    return classes
