"""Tiny copies of the data sets, in the formats of the originals."""

import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

TRAIN, TEST = 40, 12


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


@pytest.fixture
def write_fashion() -> Callable[..., Path]:
    """Write idx files with labels 0, 1, ..., 9, 0, ...; `splits` says which."""

    def write(folder: Path, *, zipped: bool = False, splits: tuple[str, ...] = ("train", "t10k")) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for split in splits:
            count = TRAIN if split == "train" else TEST
            arrays = {"images-idx3": pixels(count, 28, 28), "labels-idx1": np.arange(count, dtype=np.uint8) % 10}
            for kind, array in arrays.items():
                path = folder / f"{split}-{kind}-ubyte{'.gz' if zipped else ''}"
                path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
        return folder

    return write


@pytest.fixture
def write_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write pickles as they are in the archives of CIFAR; the published checksums become those of these files."""

    def write(source: type[datasets.CIFAR10], *, splits: tuple[str, ...] = ("train", "test")) -> Path:
        hundred = source is datasets.CIFAR100
        folder = tmp_path / source.base_folder
        folder.mkdir()
        for split in ("train", "test"):
            listed = []
            for seed, (name, _) in enumerate(getattr(source, f"{split}_list")):
                count = TRAIN if split == "train" else TEST
                labels = [i % (100 if hundred else 10) for i in range(count)]
                entry = {"data": pixels(count, 3072, seed=seed), "fine_labels" if hundred else "labels": labels}
                content = pickle.dumps(entry)
                if split in splits:
                    (folder / name).write_bytes(content)
                listed.append([name, hashlib.md5(content).hexdigest()])
            monkeypatch.setattr(source, f"{split}_list", listed)
        return tmp_path

    return write


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[..., Path]:
    """Write folders of PNGs from `{"train/cat": 3, ...}`: path below the root to number of images."""

    def write(counts: dict[str, int]) -> Path:
        root = tmp_path / "pictures"
        for number, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for i in range(count):
                image = pixels(20 + i % 3, 24, 3, seed=100 * number + i)
                Image.fromarray(image).save(root / name / f"{i:03d}.png")
        return root

    return write
