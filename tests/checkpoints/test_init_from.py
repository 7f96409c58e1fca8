"""Trainings that begin with weights of elsewhere: files that hold weights alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.running import tiny_config
from thresher.run import train as training

MODEL: dict[str, Any] = {"img_size": 28, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
LIKE_OURS: dict[str, Any] = {"global_pool": "avg", "class_token": False}
FROZEN = ("optimizer.lr=0", "optimizer.weight_decay=0", "trainer.max_epochs=1")


def weights(classes: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **MODEL, **LIKE_OURS).state_dict()


def trained(folder: Path, path: Path, *overrides: str) -> dict[str, Tensor]:
    training.train(tiny_config(folder, f"init_from='{path}'", *FROZEN, *overrides))
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("net."): value for name, value in stored.items()}


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("weights.safetensors", save_file),
        ("weights.pth", torch.save),
        ("timm.pth.tar", lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path)),
        ("parallel.pt", lambda state, path: torch.save({f"module.{k}": x for k, x in state.items()}, path)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_under_the_names_of_their_library_are_those_it_begins_with(
    name: str, save: Callable[[Any, Any], object], tmp_path: Path
) -> None:
    given = weights(10)
    save(given, tmp_path / name)
    found = trained(tmp_path / "run", tmp_path / name)
    for key, value in given.items():
        assert torch.equal(found[key], value), key


def test_a_classifier_for_other_classes_begins_anew_and_is_named(tmp_path: Path) -> None:
    given = weights(1000)
    save_file(given, tmp_path / "weights.safetensors")
    left_out = r"another number of classes: net\.head\.bias, net\.head\.weight begin untrained"
    with pytest.warns(UserWarning, match=left_out):
        found = trained(tmp_path / "run", tmp_path / "weights.safetensors")
    assert found["head.weight"].shape == (10, 16)
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], given["blocks.1.mlp.fc1.weight"])


def test_weights_that_do_not_fit_or_are_none_are_refused(tmp_path: Path) -> None:
    whole, path = weights(10), tmp_path / "weights.safetensors"
    save_file(whole, path)
    with pytest.raises(ValueError, match=r"does not fit this network: missing net\.blocks\.2\."):
        trained(tmp_path / "a", path, "model.depth=3")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read as weights: the file is damaged"):
        trained(tmp_path / "b", path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        trained(tmp_path / "c", tmp_path / "nothing.safetensors")
    torch.save({"state_dict": {"head.weight": 3}}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match=r"stores int as the weight 'head\.weight'"):
        trained(tmp_path / "d", tmp_path / "number.pt")
