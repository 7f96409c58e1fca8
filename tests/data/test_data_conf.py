"""The YAML of a data set repeats its constructor, and builds it."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torchvision import datasets

CONF = Path(__file__).parents[2] / "conf" / "data"
FILES = sorted(CONF.glob("*.yaml"))
IMAGES = ("cifar10", "cifar100", "fashion_mnist", "fashion_mnist_12k", "image_folder")
Write = Callable[..., Path]


def load(name: str) -> DictConfig:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    return config


def test_the_files_are_there() -> None:
    assert set(IMAGES) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml_repeats_the_constructor(path: Path) -> None:
    assert path.read_text().startswith("# ")
    config = OmegaConf.to_container(load(path.stem))
    module, _, name = config.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    required = inspect.Parameter.empty
    assert config == {key: "???" if p.default is required else p.default for key, p in parameters.items()}
    assert list(config) == list(parameters), "in the same order"


@pytest.mark.parametrize("name", IMAGES)
def test_yaml_builds_data_that_load(
    name: str, tmp_path: Path, write_fashion: Write, write_cifar: Write, write_tree: Write
) -> None:
    roots: dict[str, Callable[[], Path]] = {
        "fashion_mnist": lambda: write_fashion(tmp_path),
        "cifar10": lambda: write_cifar(datasets.CIFAR10),
        "cifar100": lambda: write_cifar(datasets.CIFAR100),
        "image_folder": lambda: write_tree({"cat": 10, "dog": 10}),
    }
    override = {"root": str(roots[name]())} if name in roots else {}
    data = instantiate(load(name), batch_size=2, **override)
    assert isinstance(data, pl.LightningDataModule)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (2, data.channels, data.image_size, data.image_size)
        assert labels.max() < data.num_classes == len(data.class_names)
