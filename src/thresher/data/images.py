"""Image classification data: split, augmentation, normalisation, loaders."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from thresher.attention.options import check_choice, check_integer, check_number
from thresher.data.augmentation import AUGMENTS, CropFlip, PerImage
from thresher.data.examples import Examples, Source, pass_through
from thresher.data.loading import Seeded, TrainingOrder, build_evaluation_loader, build_training_loader, check_loading
from thresher.data.summary import PartSummary, count_classes, describe_held_out


class ImageData(TrainingOrder, pl.LightningDataModule, ABC):
    """Labelled images for training, validation and test.

    A subclass sets the class attributes and reads its files in `read_train` and `read_test`. Without a validation set,
    a share of the training images is held out. Batches are pairs of images (float32, [b, c, h, w], normalised) and
    labels (int64, [b]).

    Which images are held out, and the order of training, depend on `seed` alone, never on the seed of the training
    run unless `set_order_seed` is called. Several processes share the order of one; for validation and test Lightning
    spreads the images over them.

    Args:
        batch_size: Images in a batch of one process.
        workers: Processes that load images; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `set_order_seed` is called.
        val_fraction: Share of the training images held out for validation, in (0, 1).
        limit_train: Number of training images to use after the split, from the first; None for all.
        augment: "none", "crop_flip" (shift and mirror) or "randaugment" (these, then RandAugment).
        erase: Probability that a random rectangle of a training image is erased.
        image_size: Height and width of the images in a batch: one number, or a list of two.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        channels: Colour channels of an image.
        mean: Mean of the training pixels in [0, 1], by channel.
        std: Their standard deviation.
        native_size: Height and width of the stored images.
        sources: The origin of each part, in words; known once it is read.
        left_out: Numbers of unused items by reason, for each part.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    classes: Sequence[str] = ()
    channels: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    native_size: ClassVar[int]

    def __init__(
        self,
        *,
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        augment: str = "none",
        erase: float = 0.0,
        image_size: int | Sequence[int],
    ) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        self.height, self.width = check_size(image_size)
        check_number("data.val_fraction", val_fraction, above=0.0, below=1.0)
        check_number("data.erase", erase, least=0.0)
        if erase > 1:
            raise ValueError(f"data.erase is a probability, at most 1; got {erase}")
        check_choice("data.augment", augment, AUGMENTS)
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.limit_train = limit_train
        self.augment = augment
        self.erase = erase
        self.image_size = self.height if self.height == self.width else [self.height, self.width]
        self._order_seed = seed
        self.sources: dict[str, str] = {}
        self.left_out: dict[str, Counter[str]] = {}
        self._train: Examples | None = None
        self._val: Examples | None = None
        self._test: Examples | None = None

    @abstractmethod
    def read_train(self) -> Source:
        """Read the training images."""

    def read_val(self) -> Source | None:
        """Read the validation images; None holds them out from the training images."""
        return None

    @abstractmethod
    def read_test(self) -> Source:
        """Read the test images."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels.

        Raises:
            ValueError: `setup` has not read them from the data.
        """
        if not self.classes:
            raise ValueError(f"the classes of {type(self).__name__} are known after prepare_data() and setup('fit')")
        return list(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of a model that depend on the data."""
        return {"num_classes": self.num_classes, "channels": self.channels, "image_size": self.image_size}

    @property
    def task_arguments(self) -> dict[str, int]:
        """Arguments of a task that depend on the data."""
        return {"num_classes": self.num_classes}

    def setup(self, stage: str) -> None:
        """Read the images that `stage` needs: training and validation, or test."""
        if stage in ("fit", "validate") and self._train is None:
            self._setup_training()
        if stage == "test" and self._test is None:
            test = self.read_test()
            self.sources.setdefault("test", str(test.origin))
            self._test = Examples(test, torch.arange(len(test.labels)), self.build_transform(training=False))

    def _setup_training(self) -> None:
        train, val = self.read_train(), self.read_val()
        order = draw_order(len(train.labels), self.seed)
        self.sources.setdefault("train", str(train.origin))
        if val is None:
            order, chosen = self.hold_out(order, "validation")
            val = train
            self.sources.setdefault("val", describe_held_out(self.val_fraction, self.seed))
        else:
            chosen = torch.arange(len(val.labels))
            self.sources.setdefault("val", str(val.origin))
        if self.limit_train is not None:
            if self.limit_train > len(order):
                raise ValueError(f"data.limit_train={self.limit_train} but the training split has {len(order)} images")
            self.left_out.setdefault("train", Counter())[f"by data.limit_train={self.limit_train}"] = (
                len(order) - self.limit_train
            )
            order = order[: self.limit_train]
        self._train = Examples(train, order, self.build_transform(training=True))
        self._val = Examples(val, chosen, self.build_transform(training=False))

    def summary(self) -> list[PartSummary]:
        """Summarise each part, as far as it is read."""
        parts = {"train": self._train, "val": self._val, "test": self._test}
        return [self._summarise_part(name, examples) for name, examples in parts.items()]

    def _summarise_part(self, name: str, examples: Examples | None) -> PartSummary:
        left_out: Mapping[str, int] = self.left_out.get(name, {})
        if examples is None:
            return PartSummary(name, "images", None, "not read", left_out=left_out)
        labels = examples.source.labels[examples.indices].tolist()
        counts = count_classes(self.class_names, labels)
        return PartSummary(name, "images", len(examples), self.sources[name], counts, left_out)

    def hold_out(self, order: Int64[Tensor, " n"], what: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " k"]]:
        """Split `order` into the rest and the held-out share `val_fraction`.

        Raises:
            ValueError: One of the two would be empty.
        """
        count = round(self.val_fraction * len(order))
        if not 0 < count < len(order):
            split = f"{len(order) - count} for training and {count} for {what}"
            raise ValueError(
                f"data.val_fraction={self.val_fraction} of {len(order)} images leaves {split}; both need some"
            )
        return order[count:], order[:count]

    def build_transform(self, *, training: bool) -> nn.Module:
        """Build the transform from what a source loads to the images of a batch."""
        augment = training and self.augment != "none"
        steps = [self.build_frame(augment=augment)]
        if augment and self.augment == "randaugment":
            steps.append(PerImage(v2.RandAugment()))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        if training and self.erase > 0:
            steps.append(PerImage(v2.RandomErasing(self.erase)))
        return nn.Sequential(*steps)

    def restore_pixels(self, images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Restore the pixels of normalised images."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def build_frame(self, *, augment: bool) -> nn.Module:
        """Build the transform that resizes images to `image_size`, with crop and flip if `augment`."""
        resize = nn.Identity() if self.image_size == self.native_size else v2.Resize([self.height, self.width])
        return nn.Sequential(resize, CropFlip()) if augment else resize

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load shuffled batches of one size; drop a smaller last batch unless it is the only one."""
        train = Seeded(self._require(self._train, "fit"), self.order_seed)
        return build_training_loader(train, self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load all validation images, in a fixed order."""
        return build_evaluation_loader(self._require(self._val, "fit"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load all test images, in a fixed order."""
        return build_evaluation_loader(self._require(self._test, "test"), self.trainer, **self._options)

    def _require(self, examples: Examples | None, stage: str) -> Examples:
        if examples is None:
            raise ValueError(f"{type(self).__name__} has not read its images; call prepare_data() and setup({stage!r})")
        return examples

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": pass_through,
        }


def draw_order(count: int, seed: int) -> Int64[Tensor, " n"]:
    """Draw an order of the numbers below `count` that depends on `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Check `image_size`, and return height and width.

    Raises:
        ValueError: It is neither one number of pixels nor two.
    """
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise ValueError(f"data.image_size is a whole number, or a height and a width such as [64,48]; got {size!r}")
    for side in sides:
        check_integer("data.image_size", side, 1)
    return sides[0], sides[1]
