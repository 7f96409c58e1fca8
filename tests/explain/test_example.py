"""Explain mode by the real command: maps of test examples, of images and of texts, in files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import CONF, run_eval, tiny_config
from thresher.config.evaluation import read_examples
from thresher.config.overrides import compose_config
from thresher.run import train as training
from thresher.run.build import build_data

SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks.watch.moved=0", "compute.target=0.5")
TEXT = (
    *("data=shakespeare", "data.context=32", "data.batch_size=8", "data.objective=denoising"),
    *("task=language_modeling", "model=transformer", "model.dim=16", "model.depth=1", "model.num_heads=2"),
    *("model.ffn_dim=24", "attention=dense", "compute=free", "trainer.max_epochs=1", "trainer.limit_train_batches=2"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1", "run.name=test"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    training.train(tiny_config(folder / "run", *SHORT))
    return folder


@pytest.fixture(scope="module")
def explained(images: Path) -> tuple[Path, dict[str, float]]:
    folder = images / "eval"
    ckpt = f"ckpt='{images}/run/checkpoints/best.ckpt'"
    return folder, run_eval([ckpt, "explain=true", "explain.example=[3,0]", f"run.dir='{folder}'"], CONF)


def read(folder: Path, example: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = folder / "explain" / f"example_{example}.json"
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        return json.loads(path.read_text()), dict(arrays)


def test_each_example_leaves_its_numbers_their_meaning_and_a_picture(explained: tuple[Path, dict[str, float]]) -> None:
    folder, _ = explained
    assert sorted(path.name for path in (folder / "explain").iterdir()) == [
        f"example_{i}.{kind}" for i in (0, 3) for kind in ("json", "npz", "png")
    ]
    example, _ = read(folder, 3)
    data = build_data(tiny_config(folder))
    data.setup("test")
    image, label = data.test_dataloader().dataset[3]
    assert example["label"] == data.class_names[int(label)]
    assert example["picture"] == [28, 28, 1]
    assert example["grid"] == [7, 7]
    _, arrays = read(folder, 3)
    raw = np.asarray(data.restore_pixels(image[None])[0] if image.is_floating_point() else image.permute(1, 2, 0))
    np.testing.assert_array_equal(arrays["picture"], raw)


def test_kept_pairs_are_those_the_mechanism_counts(explained: tuple[Path, dict[str, float]]) -> None:
    example, arrays = read(explained[0], 0)
    assert [layer["name"] for layer in example["layers"]] == ["blocks.0.attn", "blocks.1.attn"]
    for i, layer in enumerate(example["layers"]):
        weights = arrays[f"layer.{i}.weights"]
        kept = np.unpackbits(arrays[f"layer.{i}.kept"], axis=-1, count=weights.shape[2])
        assert weights.shape == arrays[f"layer.{i}.effective"].shape == (2, 49, 49)
        np.testing.assert_allclose(weights.astype(float).sum(-1), 1, atol=5e-3)
        for head, about in enumerate(layer["heads"]):
            assert kept[head].mean() == pytest.approx(about["kept"], abs=1e-6)
            assert about["threshold"] > 0
            assert 0 < about["rank"] <= 8  # of a head of 8 dimensions
            assert 0 <= about["ineffective"] < 1
        assert 0 < kept.mean() < 1


def test_explaining_does_not_change_the_test(explained: tuple[Path, dict[str, float]], images: Path) -> None:
    plain = run_eval([f"ckpt='{images}/run/checkpoints/best.ckpt'", f"run.dir='{images}/plain'"], CONF)
    assert plain == explained[1]
    assert not (images / "plain" / "explain").exists()


def test_in_an_encoder_decoder_each_layer_knows_which_text_its_keys_are(tmp_path: Path) -> None:
    training.train(compose_config(CONF, "train", [*TEXT, f"run.dir='{tmp_path}/run'"]))
    run_eval([f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'", "explain.example=1", f"run.dir='{tmp_path}/eval'"], CONF)
    example, arrays = read(tmp_path / "eval", 1)
    source, target = example["texts"]
    assert example["label"] is None
    sides = {layer["name"]: (layer["queries"]["input"], layer["keys"]["input"]) for layer in example["layers"]}
    assert sides == {"encoder.blocks.0.attn": (0, 0), "decoder.blocks.0.attn": (1, 1), "decoder.blocks.0.cross": (1, 0)}
    assert arrays["layer.2.weights"].shape[1:] == (len(target), len(source))
    assert "[mask]" in source


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"explain": "yes"}, "explain is true or false, not 'yes'"),
        ({"explain": False, "explain.example": 1}, "contradict each other"),
        ({"explain.example": -1}, "explain.example is a place in the test data from 0"),
        ({"explain.example": []}, "explain.example is a place"),
        ({"explain": True, "explain.example": [0, True]}, "explain.example is a place"),
    ],
)
def test_what_is_no_place_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_examples(options)


def test_places_are_read() -> None:
    assert read_examples({}) == read_examples({"explain": False}) == []
    assert read_examples({"explain": True}) == [0]
    assert read_examples({"explain.example": [7, 2, 7]}) == [7, 2]


def test_an_example_beyond_the_data_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"explain\.example=9999, but the test data have 2000 examples"):
        run_eval(
            [f"ckpt='{images}/run/checkpoints/best.ckpt'", "explain.example=9999", f"run.dir='{tmp_path}/x'"], CONF
        )
