"""Folders of images, one for each class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from thresher.data import image_folder
from thresher.data.image_folder import ImageFiles, ImageFolder

Write = Callable[[dict[str, int]], Path]
FLAT = {"cat": 12, "dog": 8}
TRAIN = {"train/cat": 6, "train/dog": 4}
VAL = {"val/cat": 2, "val/dog": 1}
TEST = {"test/cat": 1, "test/dog": 2}


def paths(source: ImageFiles) -> set[Path]:
    return set(source.paths)


def ready(root: Path, **options: object) -> ImageFolder:
    data = ImageFolder(**{"root": root, "batch_size": 4, "image_size": 16} | options)
    data.prepare_data()
    data.setup("fit")
    return data


def split_of(data: ImageFolder) -> list[set[Path]]:
    data.setup("test")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    return [{loader.dataset.source.paths[i] for i in loader.dataset.indices} for loader in loaders]


def test_classes_without_splits_are_divided_by_seed(write_tree: Write) -> None:
    root = write_tree(FLAT)
    torch.manual_seed(1)
    train, val, test = split_of(ready(root))
    assert [len(train), len(val), len(test)] == [16, 2, 2]
    assert train | val | test == set(root.rglob("*.png"))
    torch.manual_seed(2)
    assert split_of(ready(root)) == [train, val, test]
    assert split_of(ready(root, seed=5)) != [train, val, test]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "VAL", "Test"),
        ("training", "valid", "testing"),
        ("TRAINING", "Validation", "TESTING"),
        ("train", "dev", "test"),
    ],
)
def test_names_say_which_part_a_folder_is(write_tree: Write, train: str, val: str, test: str) -> None:
    names = {"train": train, "val": val, "test": test}
    counts = {f"{names[key.partition('/')[0]]}/{key.partition('/')[2]}": n for key, n in (TRAIN | VAL | TEST).items()}
    root = write_tree(counts)
    data = ready(root)
    for part, folder, found in zip(data.summary(), names.values(), split_of(data), strict=True):
        assert found == set((root / folder).rglob("*.png"))
        assert part.name == "test" or part.source == str(root / folder)
    assert data.summary()[2].source == str(root / test)


def test_validation_is_held_out_where_it_has_no_folder(write_tree: Write) -> None:
    root = write_tree(TRAIN | TEST)
    train, val, test = split_of(ready(root, val_fraction=0.3))
    assert (len(train), len(val), len(test)) == (7, 3, 3)
    assert train | val == set((root / "train").rglob("*.png"))


def test_labels_follow_the_sorted_names(write_tree: Write) -> None:
    data = ready(write_tree(FLAT))
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    source = data.train_dataloader().dataset.source
    assert [data.class_names[label] for label in source.labels] == [path.parent.name for path in source.paths]


def test_class_names_before_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ImageFolder are known after prepare_data\(\) and setup\('fit'\)"):
        _ = ImageFolder(root=tmp_path).class_names


def test_limited_training_images_come_from_all_classes(write_tree: Write) -> None:
    data = ready(write_tree({"train/a": 30, "train/b": 30} | {"val/a": 1, "val/b": 1}), limit_train=20)
    dataset = data.train_dataloader().dataset
    assert len(dataset) == 20
    assert 4 < dataset.source.labels[dataset.indices].sum() < 16


@pytest.mark.parametrize("counts", [FLAT, TRAIN | VAL | TEST])
def test_fit_opens_no_test_image(write_tree: Write, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]) -> None:
    root = write_tree(counts)
    opened: set[Path] = set()
    original = Image.open

    def record(path: Path, **options: Any) -> Image.Image:
        opened.add(path)
        return original(path, **options)

    monkeypatch.setattr(Image, "open", record)
    data = ready(root, batch_size=2)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            pass
    train, val, test = split_of(data)
    assert opened == train | val
    assert test
    assert not opened & test


def test_fit_needs_no_test_folder(write_tree: Write) -> None:
    data = ready(write_tree(TRAIN | VAL))
    with pytest.raises(
        FileNotFoundError, match=r"a folder train but none for the test \(test or testing\).*test=false"
    ):
        data.setup("test")


def test_evaluation_resizes_and_crops_the_centre(write_tree: Write) -> None:
    data = ready(write_tree(FLAT), image_size=14)
    dataset = data.val_dataloader().dataset
    image, _ = dataset[0]
    with Image.open(dataset.source.paths[dataset.indices[0]]) as stored:
        width, height = stored.size
        scale = 16 / height
        resized = stored.resize((int(width * scale), 16), Image.Resampling.BILINEAR)
    left = round((resized.width - 14) / 2)
    expected = np.asarray(resized.crop((left, 1, left + 14, 15)), dtype=np.float32) / 255
    expected = (torch.from_numpy(expected).permute(2, 0, 1) - torch.tensor(data.mean)[:, None, None]) / torch.tensor(
        data.std
    )[:, None, None]
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("augment", ["none", "crop_flip", "randaugment"])
def test_only_training_is_augmented(write_tree: Write, augment: str) -> None:
    data = ready(write_tree(FLAT), augment=augment)
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    images, labels = train.__getitems__([2] * 16)
    assert images.shape == (16, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(torch.unique(images, dim=0)) == (1 if augment == "none" else 16)
    assert len(torch.unique(val.__getitems__([0] * 4)[0], dim=0)) == 1


def test_default_size(write_tree: Write) -> None:
    data = ImageFolder(root=write_tree(FLAT), batch_size=2)
    data.setup("fit")
    assert data.image_size == 224
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].shape == (2, 3, 224, 224)


def test_other_modes_nested_folders_and_stray_files(write_tree: Write) -> None:
    root = write_tree(FLAT)
    Image.new("L", (9, 30)).save(root / "cat" / "grey.JPG", format="jpeg")
    (root / "cat" / "deeper").mkdir()
    Image.new("RGBA", (30, 9)).save(root / "cat" / "deeper" / "clear.webp")
    for stray in ("cat/notes.txt", "cat/.hidden.png", "list.csv"):
        (root / stray).write_text("no image")
    (root / ".cache").mkdir()
    data = ready(root)
    assert data.class_names == ["cat", "dog"]
    dataset = data.train_dataloader().dataset
    assert sum(len(loaded) for loaded in split_of(data)) == 22
    assert dataset.__getitems__(range(len(dataset)))[0].shape == (len(dataset), 3, 16, 16)


def test_a_class_may_be_called_train(write_tree: Write) -> None:
    assert ready(write_tree({"plane": 10, "train": 10})).class_names == ["plane", "train"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "there is no folder .*pictures; set data.root"),
        ({"": 3}, "pictures should hold a folder of images for each class; it holds none"),
        ({"train": 3, "Val": 3}, "should hold a folder of images for each class; it holds only Val, train"),
        ({"cat": 3}, "pictures has a single class, cat; classification needs two or more"),
        ({"train/cat": 3}, "train has a single class, cat"),
        ({"cat": 3, "dog": 0}, "dog holds no image that can be read$"),
        (TRAIN | {"val/cat": 1, "val/dog": 0}, "val/dog holds no image"),
        (TRAIN | {"val/cat": 1}, "val lacks classes of the training images: dog"),
        (TRAIN | VAL | {"val/eel": 1, "val/bee": 1}, "val has classes that the training images lack: bee, eel"),
        (TRAIN | VAL | {"valid/cat": 1}, "has both val and valid; keep one"),
        (TRAIN | VAL | {"Dev": 1}, "has both Dev and val; keep one"),
        (TRAIN | {"training/cat": 1}, "has both train and training; keep one"),
        (TRAIN | {"val": 3}, "val holds no folders of classes; put its images into such, or rename it"),
        (VAL | TEST, "has folders of classes in val, test but none in train or training"),
        (FLAT | TEST, "has folders of classes in test but none in train or training"),
        ({"cat": 2, "dog": 2}, "val_fraction=0.1 of 4 images leaves 4 for training and 0 for test; both need some"),
        ({"cat": 3, "dog": 3}, "val_fraction=0.1 of 5 images leaves 5 for training and 0 for validation"),
    ],
)
def test_folders_that_cannot_be_used(write_tree: Write, counts: dict[str, int], message: str) -> None:
    data = ImageFolder(root=write_tree(counts))
    for _ in range(2):  # a second try must not slip past the check
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.setup("fit")


def test_test_folder_with_other_classes(write_tree: Write) -> None:
    data = ready(write_tree(TRAIN | VAL | {"test/cat": 1}))
    with pytest.raises(ValueError, match="test lacks classes of the training images: dog"):
        data.setup("test")


def test_what_lies_beside_the_parts_is_told_by_name(write_tree: Write) -> None:
    root = write_tree(TRAIN | VAL | TEST | {"unlabelled": 3})
    (root / "list.csv").write_text("no image")
    train = ready(root).summary()[0]
    assert train.left_out == {"folders beside it (unlabelled)": 1, "files beside the folders of classes": 1}
    assert "1 folders beside it (unlabelled)" in train.line()


def test_a_damaged_image_is_named(write_tree: Write) -> None:
    root = write_tree(TRAIN)
    path = root / "train" / "cat" / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    source = ready(root).train_dataloader().dataset.source
    with pytest.raises(ValueError, match=rf"{path} is not a readable image \(.*\); repair or remove it"):
        source.load(torch.tensor([source.paths.index(path)]))


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_long_images_are_never_resized_as_a_whole(
    write_tree: Write, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], augment: str
) -> None:
    root = write_tree(TRAIN | VAL | TEST)
    for path in root.rglob("*.png"):
        Image.new("RGB", size, "red").save(path)
    largest = [0]
    original = Image.Image.resize

    def record(image: Image.Image, to: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        largest[0] = max(largest[0], to[0] * to[1])
        return original(image, to, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    data = ready(root, image_size=224, augment=augment)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, _ = next(iter(loader))
        assert images.shape[1:] == (3, 224, 224)
    assert 0 < largest[0] <= 16 * 224 * 224


@pytest.mark.parametrize("augment", ["none", "crop_flip", "randaugment"])
def test_rectangular_images(write_tree: Write, augment: str) -> None:
    data = ready(write_tree(FLAT), image_size=[16, 24], augment=augment)
    data.setup("test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, _ = next(iter(loader))
        assert images.shape[1:] == (3, 16, 24)
    assert data.model_arguments["image_size"] == [16, 24]
    assert data.restore_pixels(images).shape[1:] == (16, 24, 3)


def test_what_fit_left_out_is_told_after_the_test_is_read(write_tree: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    walk = image_folder.list_images
    monkeypatch.setattr(image_folder, "list_images", lambda *args: listed.append(args) or walk(*args))
    data = ready(write_tree(FLAT), limit_train=5)
    before = data.summary()[0].left_out
    data.setup("test")
    assert data.summary()[0].left_out == before == {"by data.limit_train=5": 11}
    assert len(listed) == 1
