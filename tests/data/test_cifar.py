"""CIFAR from pickles as they are in the archives."""

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from thresher.data import cifar
from thresher.data.cifar import CIFAR10, CIFAR100

Write = Callable[..., Path]
BOTH = pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])


@BOTH
def test_reads_all_images_as_torchvision_does(
    write_cifar: Write, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_cifar(kind.published)
    data = kind(root=root, batch_size=8)
    monkeypatch.setattr(kind.published, "_load_meta", lambda self: None)
    for train, source in ((True, data.read_train()), (False, data.read_test())):
        theirs = kind.published(root, train=train)
        assert torch.equal(source.images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert source.labels.tolist() == theirs.targets
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.dtype == torch.int64


@BOTH
def test_class_names(kind: type[CIFAR10]) -> None:
    data = kind()
    assert data.num_classes == len(set(data.class_names)) == (100 if kind is CIFAR100 else 10)
    assert data.class_names == sorted(data.class_names)
    assert (data.channels, data.image_size) == (3, 32)


@BOTH
def test_fit_needs_no_test_file(write_cifar: Write, kind: type[CIFAR10]) -> None:
    data = kind(root=write_cifar(kind.published, splits=("train",)))
    data.setup("fit")
    with pytest.raises(FileNotFoundError, match="there is no test"):
        data.setup("test")


@BOTH
def test_missing_files_say_how_to_get_them(tmp_path: Path, kind: type[CIFAR10]) -> None:
    data = kind(root=tmp_path)
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as caught:
        data.setup("fit")
    for part in (str(tmp_path), "data.download=true", kind.published.filename, kind.published.url):
        assert part in str(caught.value)


@BOTH
def test_damaged_file(write_cifar: Write, kind: type[CIFAR10]) -> None:
    root = write_cifar(kind.published)
    name, md5 = kind.published.train_list[-1]
    path = root / kind.published.base_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path} is damaged \(its MD5 is not {md5}\); delete it"):
        kind(root=root).setup("fit")


def test_archive_in_place_is_unpacked_without_a_network(write_cifar: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = datasets.CIFAR10
    root = write_cifar(source)
    folder, archive = root / source.base_folder, root / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "archive_sha256", hashlib.sha256(archive.read_bytes()).hexdigest())
    (folder / "test_batch").unlink()
    (folder / "data_batch_2").write_bytes(b"damaged")
    data = CIFAR10(root=root, download=True)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert len(data.train_dataloader().dataset) == 180


def test_download_runs_only_where_files_are_missing(
    tmp_path: Path, write_cifar: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(cifar, "download_url", lambda url, root, **_: asked.append((url, root)))
    monkeypatch.setattr(cifar, "unpack", lambda *_: None)
    CIFAR10(root=tmp_path).prepare_data()
    assert asked == [], "not asked for"
    CIFAR10(root=tmp_path, download=True).prepare_data()
    assert asked == [(datasets.CIFAR10.url, tmp_path)]
    CIFAR10(root=write_cifar(datasets.CIFAR10), download=True).prepare_data()
    assert len(asked) == 1, "all there"


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(cifar, "download_url", fail)
    with pytest.raises(FileNotFoundError, match=r"could not download https://.*: File not found or corrupted\."):
        CIFAR10(root=tmp_path, download=True).prepare_data()
