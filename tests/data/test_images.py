"""What holds for all image data, on the one that ships."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor, nn

from thresher.data.examples import StoredImages
from thresher.data.fashion_mnist_12k import FashionMNIST12k
from thresher.data.images import ImageData

FORK = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
QUIET = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")


class Synthetic(ImageData):
    """A few random images that need no file."""

    classes = ("left", "right")
    channels = 1
    mean = (0.5,)
    std = (0.25,)
    native_size = 8
    count = 20

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"image_size": 8, "batch_size": 4} | options)

    def read_train(self) -> StoredImages:
        images = torch.arange(self.count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
        return StoredImages(images, torch.arange(self.count) % 2, classes=2, origin="nowhere")

    def read_test(self) -> StoredImages:
        return self.read_train()


def ready(data: ImageData, stage: str = "fit") -> ImageData:
    data.prepare_data()
    data.setup(stage)
    return data


def identities(images: Tensor) -> list[int]:
    """Recover which synthetic images a batch holds: image i has all pixels i."""
    return ((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()


def split_of(data: ImageData) -> tuple[list[int], list[int]]:
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    return train.indices.tolist(), val.indices.tolist()


def epoch(data: ImageData) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data.train_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(scope="module")
def fashion() -> ImageData:
    return ready(FashionMNIST12k())


def test_batches_have_the_promised_form(fashion: ImageData) -> None:
    for loader in (fashion.train_dataloader(), fashion.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (64, 1, 28, 28)
        assert images.dtype == torch.float32
        assert labels.shape == (64,)
        assert labels.dtype == torch.int64
        image, label = loader.dataset[0]
        assert image.shape == (1, 28, 28)
        assert label.shape == ()


def test_facts_are_known_before_setup() -> None:
    data = FashionMNIST12k(image_size=14)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 14)
    assert data.class_names[9] == "Ankle boot"
    assert len(set(data.class_names)) == 10


def test_training_pixels_are_normalised(fashion: ImageData) -> None:
    images, _ = epoch(fashion)
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_images_keep_their_labels(fashion: ImageData) -> None:
    source = fashion.read_train()
    images, labels = map(torch.cat, zip(*fashion.val_dataloader(), strict=True))
    indices = fashion.val_dataloader().dataset.indices
    torch.testing.assert_close(images * 0.3513 + 0.2840, source.images[indices] / 255)
    assert torch.equal(labels, source.labels[indices])
    images, labels = epoch(ready(Synthetic()))
    assert [identity % 2 for identity in identities(images)] == labels.tolist()


def test_split_is_disjoint_and_complete(fashion: ImageData) -> None:
    train, val = split_of(fashion)
    assert (len(train), len(val)) == (9000, 1000)
    assert sorted(train + val) == list(range(10_000))


def test_split_and_order_ignore_the_seed_of_training() -> None:
    seen = []
    for training_seed in (1, 2):
        torch.manual_seed(training_seed)
        data = ready(Synthetic())
        seen.append((split_of(data), identities(epoch(data)[0])))
    assert seen[0] == seen[1]
    other = ready(Synthetic(seed=1))
    assert split_of(other) != seen[0][0]


def test_order_changes_with_epoch_and_order_seed_alone() -> None:
    data = ready(Synthetic())
    loader = data.train_dataloader()
    first, second = ([i for images, _ in loader for i in identities(images)] for _ in range(2))
    assert first != second
    assert sorted(identities(epoch(data)[0])) == sorted(i for i in first)
    assert identities(epoch(data)[0]) == first
    split = split_of(data)
    assert data.order_seed == 0
    data.set_order_seed(7)
    assert identities(epoch(data)[0]) != first
    assert split_of(data) == split


def test_limit_train_takes_the_first_of_the_split() -> None:
    whole, limited = ready(Synthetic()), ready(Synthetic(limit_train=6))
    (train, val), (few, same_val) = split_of(whole), split_of(limited)
    assert few == train[:6]
    assert same_val == val
    assert len(split_of(ready(Synthetic(limit_train=18)))[0]) == 18
    with pytest.raises(ValueError, match="limit_train=19 but the training split has 18 images"):
        ready(Synthetic(limit_train=19))


def test_last_batch_is_dropped_unless_it_is_the_only_one() -> None:
    assert [len(y) for _, y in ready(Synthetic()).train_dataloader()] == [4] * 4
    assert [len(y) for _, y in ready(Synthetic(batch_size=18)).train_dataloader()] == [18]
    assert [len(y) for _, y in ready(Synthetic(batch_size=19)).train_dataloader()] == [18]
    data = ready(Synthetic(batch_size=3, val_fraction=0.2))
    assert [len(y) for _, y in data.val_dataloader()] == [3, 1]


def test_fit_does_not_read_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = NpzFile.__getitem__

    def record(self: NpzFile, key: str) -> Any:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(NpzFile, "__getitem__", record)
    data = ready(FashionMNIST12k())
    epoch(data)
    assert set(read) == {"train_images", "train_labels"}
    data.setup("validate")
    assert len(read) == 2, "images are read once"
    read.clear()
    data.setup("test")
    assert set(read) == {"test_images", "test_labels"}
    assert sum(len(y) for _, y in data.test_dataloader()) == 2000


def test_evaluation_is_not_augmented() -> None:
    plain = ready(ready(FashionMNIST12k()), "test")
    augmented = ready(ready(FashionMNIST12k(augment="randaugment", erase=1.0)), "test")
    for name in ("val_dataloader", "test_dataloader"):
        (expected, _), (images, _) = (next(iter(getattr(data, name)())) for data in (plain, augmented))
        assert torch.equal(images, expected)
    assert not torch.equal(next(iter(plain.train_dataloader()))[0], next(iter(augmented.train_dataloader()))[0])


@pytest.mark.parametrize(("augment", "erase"), [("crop_flip", 0.0), ("randaugment", 0.0), ("none", 1.0)])
def test_training_images_are_drawn_anew_each_time(augment: str, erase: float) -> None:
    dataset = ready(FashionMNIST12k(augment=augment, erase=erase)).train_dataloader().dataset
    images, labels = dataset.__getitems__([3] * 64)
    assert len(torch.unique(images, dim=0)) > 16
    assert len(labels.unique()) == 1
    assert images.isfinite().all()


def test_no_augmentation_by_default() -> None:
    dataset = ready(FashionMNIST12k()).train_dataloader().dataset
    images, _ = dataset.__getitems__([3] * 8)
    assert len(torch.unique(images, dim=0)) == 1


def test_image_size_resizes_all_stages() -> None:
    data = ready(ready(FashionMNIST12k(image_size=14, augment="crop_flip", erase=0.5)), "test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))[0].shape == (64, 1, 14, 14)


@pytest.mark.parametrize("augment", ["none", "crop_flip", "randaugment"])
def test_images_may_be_rectangular(augment: str) -> None:
    data = ready(ready(FashionMNIST12k(image_size=(14, 28), augment=augment, limit_train=64)), "test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))[0].shape == (64, 1, 14, 28)
    assert data.model_arguments["image_size"] == [14, 28]
    assert FashionMNIST12k(image_size=[28, 28]).model_arguments["image_size"] == 28


@FORK
def test_workers_deliver_the_same_batches() -> None:
    alone, (images, labels) = epoch(ready(Synthetic())), epoch(ready(Synthetic(workers=2)))
    assert torch.equal(images, alone[0])
    assert torch.equal(labels, alone[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number, at least 1; got 0"),
        ({"batch_size": 0.5}, "data.batch_size must be a whole number, at least 1; got 0.5"),
        ({"batch_size": True}, "data.batch_size must be a whole number, at least 1; got True"),
        ({"workers": -1}, "data.workers must be a whole number, at least 0; got -1"),
        ({"seed": -1}, "data.seed must be a whole number, 0 .. 9223372036854775807; got -1"),
        ({"image_size": 0}, "data.image_size must be a whole number, at least 1; got 0"),
        ({"image_size": [28, 0]}, "data.image_size must be a whole number, at least 1; got 0"),
        *[
            ({"image_size": size}, r"data.image_size is a whole number, or a height and a width such as \[64,48\]; got")
            for size in ([28], [28, 28, 1], "28", 28.0, None)
        ],
        ({"limit_train": 0}, "data.limit_train must be a whole number, at least 1; got 0"),
        ({"val_fraction": 0.0}, "data.val_fraction must be a finite number above 0 and below 1; got 0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction must be a finite number above 0 and below 1; got 1.0"),
        ({"val_fraction": float("nan")}, "data.val_fraction must be a finite number above 0 and below 1; got nan"),
        ({"erase": 1.5}, "data.erase is a probability, at most 1; got 1.5"),
        ({"augment": "flip"}, "data.augment must be one of none, crop_flip, randaugment; got 'flip'"),
    ],
)
def test_hyper_parameters_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FashionMNIST12k(**options)


def test_order_seed_outside_its_range() -> None:
    with pytest.raises(ValueError, match="order_seed must be a whole number"):
        Synthetic().set_order_seed(-1)


@pytest.mark.parametrize(("fraction", "split"), [(0.02, "20 for training and 0"), (0.98, "0 for training and 20")])
def test_a_split_without_images(fraction: float, split: str) -> None:
    with pytest.raises(ValueError, match=f"val_fraction={fraction} of 20 images leaves {split} for validation"):
        ready(Synthetic(val_fraction=fraction))


def test_loaders_before_setup() -> None:
    data = Synthetic()
    for stage, loader in (("fit", data.train_dataloader), ("fit", data.val_dataloader), ("test", data.test_dataloader)):
        with pytest.raises(ValueError, match=rf"Synthetic has not read its images; .* setup\('{stage}'\)"):
            loader()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (3, [0, 1], "a file holds 3 images but 2 labels"),
        (0, [], "a file holds no images"),
        (2, [0, 2], "a file has labels from 0 to 2; 2 classes go from 0 to 1"),
        (2, [-1, 0], "a file has labels from -1 to 0"),
    ],
)
def test_stored_images_are_checked(images: int, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoredImages(
            torch.zeros(images, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels).long(), classes=2, origin="a file"
        )


class Spy(pl.LightningModule):
    """Writes down which images it is shown, one file a stage and process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.folder = folder

    def note(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        with (self.folder / f"{stage}-{self.global_rank}").open("a") as file:
            file.write(" ".join(map(str, identities(batch[0]))) + "\n")
        return self.layer(batch[0][:, 0, 0, :1]).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.note("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.note("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.note("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, **quiet, **options)


def seen(folder: Path, name: str) -> list[list[int]]:
    return [[int(i) for i in line.split()] for line in (folder / name).read_text().splitlines()]


@QUIET
def test_lightning_runs_all_stages(tmp_path: Path) -> None:
    data, spy = Synthetic(), Spy(tmp_path)
    run = trainer(devices=1)
    run.fit(spy, data)
    run.test(spy, data, verbose=False)
    train, val = split_of(data)
    batches = seen(tmp_path, "train-0")
    assert len(batches) == 8
    assert {i for batch in batches for i in batch} <= set(train)
    assert {i for batch in seen(tmp_path, "val-0") for i in batch} == set(val)
    assert sorted(i for batch in seen(tmp_path, "test-0") for i in batch) == list(range(20))


@QUIET
@FORK
@pytest.mark.parametrize("batch_size", [3, 16])
def test_two_processes_share_an_epoch(tmp_path: Path, batch_size: int) -> None:
    data = Synthetic(batch_size=batch_size)
    trainer(strategy="ddp_fork", devices=2).fit(Spy(tmp_path), data)
    ranks = [seen(tmp_path, f"train-{rank}") for rank in range(2)]
    first_epoch = [[i for batch in batches[: len(batches) // 2] for i in batch] for batches in ranks]
    assert [len(images) for images in first_epoch] == [9, 9]
    train, _ = split_of(ready(data))
    assert sorted(first_epoch[0] + first_epoch[1]) == sorted(train)


@QUIET
@FORK
def test_two_processes_evaluate_each_example_once_in_as_many_batches(tmp_path: Path) -> None:
    data, spy = Synthetic(batch_size=5), Spy(tmp_path)
    data.count = 21
    run = trainer(strategy="ddp_fork", devices=2)
    run.fit(spy, data)
    run.test(spy, data, verbose=False)
    ranks = [seen(tmp_path, f"test-{rank}") for rank in range(2)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[5, 6], [5, 5]]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(21))
    _, val = split_of(ready(data))
    held_out = [i for rank in range(2) for batch in seen(tmp_path, f"val-{rank}") for i in batch]
    assert sorted(held_out) == sorted(2 * val)  # in two epochs


@QUIET
@FORK
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_two_processes_overfit_on_a_few_batches(tmp_path: Path) -> None:
    data = Synthetic(batch_size=4)
    trainer(strategy="ddp_fork", devices=2, overfit_batches=2).fit(Spy(tmp_path), data)
    ranks = [seen(tmp_path, f"train-{rank}") for rank in range(2)]
    assert [len(batches) for batches in ranks] == [4, 4]
    assert ranks[0][:2] == ranks[0][2:] != ranks[1][:2]
