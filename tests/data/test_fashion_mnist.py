"""Fashion-MNIST from files, and the part that ships."""

import gzip
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision import datasets

from thresher.data import fashion_mnist_12k
from thresher.data.fashion_mnist import FashionMNIST
from thresher.data.fashion_mnist_12k import FashionMNIST12k

Write = Callable[..., Path]


@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_reads_both_layouts_plain_and_zipped(tmp_path: Path, write_fashion: Write, layout: str, zipped: bool) -> None:
    write_fashion(tmp_path / layout, zipped=zipped)
    data = FashionMNIST(root=tmp_path, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    counts = [len(loader().dataset) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    assert counts == [36, 4, 12]
    assert data.num_classes == 10


def test_reads_what_torchvision_reads(tmp_path: Path, write_fashion: Write) -> None:
    write_fashion(tmp_path / "FashionMNIST" / "raw")
    data = FashionMNIST(root=tmp_path)
    for train, source in ((True, data.read_train()), (False, data.read_test())):
        theirs = datasets.FashionMNIST(tmp_path, train=train)
        assert torch.equal(source.images[:, 0], theirs.data)
        assert torch.equal(source.labels, theirs.targets)


def test_fit_needs_no_test_files(tmp_path: Path, write_fashion: Write) -> None:
    write_fashion(tmp_path, splits=("train",))
    data = FashionMNIST(root=tmp_path)
    data.setup("fit")
    with pytest.raises(FileNotFoundError, match="there is no t10k-images-idx3-ubyte"):
        data.setup("test")


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    data = FashionMNIST(root=tmp_path / "absent")
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as caught:
        data.setup("fit")
    message = str(caught.value)
    for part in (
        "there is no train-images-idx3-ubyte",
        str(tmp_path / "absent"),
        "data.download=true",
        "apt-get download dataset-fashion-mnist",
        "dpkg-deb -x",
        "data.root=",
        "data=fashion_mnist_12k",
    ):
        assert part in message


def test_download_runs_only_where_files_are_missing(
    tmp_path: Path, write_fashion: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: asked.append((root, download)))
    FashionMNIST(root=tmp_path).prepare_data()
    assert asked == [], "not asked for"
    write_fashion(tmp_path, splits=("train",))
    FashionMNIST(root=tmp_path, download=True).prepare_data()
    assert asked == [(tmp_path, True)]
    write_fashion(tmp_path)
    FashionMNIST(root=tmp_path, download=True).prepare_data()
    assert len(asked) == 1, "all there"


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, download: bool) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    with pytest.raises(FileNotFoundError, match=r"could not download Fashion-MNIST to .*no route to host"):
        FashionMNIST(root=tmp_path, download=True).prepare_data()


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda data: b"", "is not an idx file of bytes in 3 dimensions"),
        (IMAGES, lambda data: data[:1000], "984 bytes of pixels or labels where its header says 31360"),
        (IMAGES, lambda data: data + b"x", "31361 bytes of pixels or labels where its header says 31360"),
        (LABELS, lambda data: b"\0\0\x08\x03" + data[4:], "is not an idx file of bytes in 1 dimensions"),
        (LABELS, lambda data: data[:-1] + b"\x0a", "has labels from 0 to 10; 10 classes go from 0 to 9"),
        (LABELS, lambda data: data[:7] + b"\x27" + data[8:-1], "holds 40 images but 39 labels"),
        (IMAGES, lambda data: data[:11] + b"\x0e" + data[12:15] + b"\x38" + data[16:], r"images of \(14, 56\) pixels"),
        (IMAGES, lambda data: bytes((0, 0, 8, 3)) + bytes(7) + b"\x1c" + bytes(3) + b"\x1c", "40 labels"),
    ],
)
def test_damaged_files(
    tmp_path: Path, write_fashion: Write, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = write_fashion(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        FashionMNIST(root=tmp_path).setup("fit")
    assert str(tmp_path / "train-") in str(caught.value)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(bytes(range(256)))[:-20]])
def test_damaged_gzip(tmp_path: Path, write_fashion: Write, content: bytes) -> None:
    path = write_fashion(tmp_path, zipped=True) / f"{IMAGES}.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\); delete it"):
        FashionMNIST(root=tmp_path).setup("fit")


def test_shipped_images_are_balanced() -> None:
    data = FashionMNIST12k()
    for source, count in ((data.read_train(), 1000), (data.read_test(), 200)):
        assert source.labels.bincount().tolist() == [count] * 10


def test_damaged_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "fashion_mnist_12k.npz"
    content = fashion_mnist_12k.find_archive().read_bytes()
    monkeypatch.setattr(fashion_mnist_12k, "find_archive", lambda: archive)
    with pytest.raises(FileNotFoundError, match=f"{archive} is missing from the installation"):
        FashionMNIST12k().setup("fit")
    damages = [b"", b"something else", content[:100_000], content[:1_000_000] + bytes(99) + content[1_000_099:]]
    for damaged in damages:
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{archive} is damaged"):
            FashionMNIST12k().setup("fit")
