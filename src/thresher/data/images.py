"""What all image classification data share: split, augmentation, normalisation, loaders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from thresher.attention.options import check_choice, check_integer, check_number
from thresher.data.augmentation import AUGMENTS, CropFlip, PerImage
from thresher.data.examples import Examples, Source, as_delivered
from thresher.data.loading import LARGEST_SEED, Seeded, check_loading, evaluation_loader, training_loader


class ImageData(pl.LightningDataModule, ABC):
    """Labelled images for training, validation and test.

    A data set derives from this class, sets the class attributes and reads its files in `read_train` and `read_test`.
    Where there is no validation set of its own, a share of the training images is held out. Batches are pairs of images
    (float32, [b, c, h, w], normalised) and labels (int64, [b]).

    Which images are held out, and the order of training, depend on `seed` alone, never on the seed of the training
    run unless it is set as `order_seed`. Several processes share the order of one; for validation and test Lightning
    spreads the images over them.

    Args:
        batch_size: Images in a batch of one process.
        workers: Processes that load images; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `order_seed` is set.
        val_fraction: Share of the training images held out for validation, in (0, 1).
        limit_train: Train on the first so many of the training images left after the split; None for all.
        augment: "none", "crop_flip" (shift and mirror) or "randaugment" (these, then RandAugment).
        erase: Probability of a training image to lose a random rectangle.
        image_size: Height and width of the images delivered.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        channels: Colour channels of an image.
        mean: Mean of the training pixels in [0, 1], by channel.
        std: Their standard deviation.
        native_size: Height and width of the images as they are stored.

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
        image_size: int,
    ) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        check_integer("data.image_size", image_size, 1)
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
        self.image_size = image_size
        self._order_seed = seed
        self._train: Examples | None = None
        self._val: Examples | None = None
        self._test: Examples | None = None

    @abstractmethod
    def read_train(self) -> Source:
        """Return the training images."""

    def read_val(self) -> Source | None:
        """Return the validation images, None where they are to be held out from the training images."""
        return None

    @abstractmethod
    def read_test(self) -> Source:
        """Return the test images."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels.

        Raises:
            ValueError: They are read from the data, and `setup` has not run.
        """
        if not self.classes:
            raise ValueError(f"the classes of {type(self).__name__} are known after prepare_data() and setup('fit')")
        return list(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def model_arguments(self) -> dict[str, int]:
        """What a model must know of the data."""
        return {"num_classes": self.num_classes, "channels": self.channels, "image_size": self.image_size}

    @property
    def task_arguments(self) -> dict[str, int]:
        """What a task must know of the data."""
        return {"num_classes": self.num_classes}

    @property
    def order_seed(self) -> int:
        """Seed of the training order; set it before the loader is made."""
        return self._order_seed

    @order_seed.setter
    def order_seed(self, seed: int) -> None:
        check_integer("order_seed", seed, 0, LARGEST_SEED)
        self._order_seed = seed

    def setup(self, stage: str) -> None:
        """Read what `stage` needs: training and validation images, or the test images."""
        if stage in ("fit", "validate") and self._train is None:
            self._setup_training()
        if stage == "test" and self._test is None:
            test = self.read_test()
            self._test = Examples(test, torch.arange(len(test.labels)), self.transform(training=False))

    def _setup_training(self) -> None:
        train, val = self.read_train(), self.read_val()
        order = seeded_order(len(train.labels), self.seed)
        if val is None:
            order, held_out = self.hold_out(order, "validation")
            val = train
        else:
            held_out = torch.arange(len(val.labels))
        if self.limit_train is not None:
            if self.limit_train > len(order):
                raise ValueError(f"data.limit_train={self.limit_train} but the training split has {len(order)} images")
            order = order[: self.limit_train]
        self._train = Examples(train, order, self.transform(training=True))
        self._val = Examples(val, held_out, self.transform(training=False))

    def hold_out(self, order: Int64[Tensor, " n"], what: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " k"]]:
        """Cut `order` into what is left and the share `val_fraction` of it that is held out.

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

    def transform(self, *, training: bool) -> nn.Module:
        """Return the transform from what a source loads to the images of a batch."""
        augment = training and self.augment != "none"
        steps = [self.frame(augment=augment)]
        if augment and self.augment == "randaugment":
            steps.append(PerImage(v2.RandAugment()))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        if training and self.erase > 0:
            steps.append(PerImage(v2.RandomErasing(self.erase)))
        return nn.Sequential(*steps)

    def pictures(self, images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Return the pixels of normalised images."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def frame(self, *, augment: bool) -> nn.Module:
        """Return the transform that brings images to `image_size`, with crop and flip if `augment`."""
        resize = nn.Identity() if self.image_size == self.native_size else v2.Resize([self.image_size, self.image_size])
        return nn.Sequential(resize, CropFlip()) if augment else resize

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled batches of one size; a last smaller one is dropped unless it is the only one."""
        train = Seeded(self._ready(self._train, "fit"), self.order_seed)
        return training_loader(train, self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all validation images, in one order."""
        return evaluation_loader(self._ready(self._val, "fit"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all test images, in one order."""
        return evaluation_loader(self._ready(self._test, "test"), self.trainer, **self._options)

    def _ready(self, examples: Examples | None, stage: str) -> Examples:
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
            "collate_fn": as_delivered,
        }


def seeded_order(count: int, seed: int) -> Int64[Tensor, " n"]:
    """Return the numbers below `count` in an order that depends on `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
