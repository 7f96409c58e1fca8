"""Networks that a config describes: sizes that timm would fail at without a name, or round away, are told by theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from thresher.attention.dense import Dense
from thresher.attention.topk.mechanism import TopK
from thresher.hosts import mounted
from thresher.models.__main__ import FAMILIES, train_one_step
from thresher.models.build import timm_classifier, token_classifier

VIT = {"attention": Dense, "num_classes": 10, "channels": 1, "image_size": 28, "patch_size": 4, "embed_dim": 16}
ENCODER = {"attention": Dense, "num_classes": 10, "vocabulary": 20, "length": 16}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, r"model\.embed_dim=16 cannot be shared evenly by model\.num_heads=3"),
        ({"patch_size": 5}, r"model\.patch_size=5 does not divide images of 28 pixels: the last 3 of each row"),
        ({"patch_size": 56}, r"model\.patch_size=56 does not divide images of 28 pixels"),
        *[
            ({name: value}, rf"model\.{name} must be a whole number, at least 1; got")
            for name in ("patch_size", "embed_dim", "depth", "num_heads")
            for value in (0, -1, 1.5, "4", True, None)
        ],
        ({"name": "vit_tinny"}, r"timm has no model 'vit_tinny'; did you mean .*vit_tiny_"),
        ({"name": "swinn_tiny"}, r"timm has no model 'swinn_tiny'; did you mean swin_"),
        ({"name": "deit9"}, r"timm has no model 'deit9'; did you mean deit\w*( or deit\w*)+\?"),
        ({"depht": 2}, r"timm's vit_tiny_patch16_224 refuses an option of model\.\* \(patch_size=4, .*\): .*depht"),
        ({"global_pool": "nope"}, r"refuses an option of model\.\* \(.*global_pool=nope\): Only avg"),
        ({"weight_init": "nope"}, r"refuses an option of model\.\* \(.*weight_init=nope\): Assert"),
        *[
            ({name: value}, rf"model\.{name} must be a finite number, at least 0 and below 1; got")
            for name in ("drop_path_rate", "drop_rate")
            for value in (-0.1, 1, float("nan"), "0.1", None)
        ],
    ],
)
def test_sizes_of_a_vit_are_checked_by_name(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_classifier(**(VIT | {"depth": 1, "num_heads": 2} | sizes))


@pytest.mark.parametrize("name", ["dim", "depth", "num_heads", "ffn_dim"])
def test_sizes_of_the_encoder_are_checked_by_name(name: str) -> None:
    for value in (0, -1, 1.5, "4", True, None):
        with pytest.raises(ValueError, match=rf"model\.{name} must be a whole number, at least 1; got"):
            token_classifier(**(ENCODER | {name: value}))


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.1", None, True])
def test_dropout_is_a_share(value: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.dropout must be a finite number, at least 0 and below 1; got"):
        token_classifier(**ENCODER, dropout=value)


def test_images_may_be_rectangular() -> None:
    net = timm_classifier(**VIT | {"depth": 1, "num_heads": 2, "image_size": [28, 16]})
    assert net(torch.zeros(2, 1, 28, 16)).shape == (2, 10)
    for size, said in (([30, 16], "2 of each column"), ([28, 18], "2 of each row would")):
        with pytest.raises(ValueError, match=f"the last {said}"):
            timm_classifier(**VIT | {"depth": 1, "num_heads": 2, "image_size": size})


WATCHED = ("DINOv3", "ViT with rotary positions", "ViT with relative positions", "EVA-02", "BEiT", "PVT v2")


@pytest.mark.parametrize("family", WATCHED)
def test_attention_that_no_class_gives_away_is_found_and_trains(family: str) -> None:
    name, size, options = FAMILIES[family]
    small = options | ({"embed_dim": 32, "num_heads": 2} if options else {"depths": (1, 1, 1, 1)})
    assert train_one_step(name, size // 2, small, "latte").endswith("SdpaAttention")


def test_a_pooling_head_stays_dense_where_blocks_are_known_by_their_class() -> None:
    """What a checkpoint holds does not depend on whether the model was watched."""
    options = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": "map"}
    net = timm_classifier(
        attention=TopK, num_classes=10, channels=1, image_size=28, name="vit_tiny_patch16_224", **options
    )
    assert list(mounted(net)) == ["blocks.0.attn"]


def test_a_size_that_a_model_cannot_take_is_told_with_its_own() -> None:
    with pytest.raises(
        ValueError, match=r"pvt_v2_b0 cannot take images of 4 pixels .*made for 224: set data\.image_size"
    ):
        timm_classifier(attention=Dense, num_classes=10, channels=3, image_size=4, name="pvt_v2_b0")


def test_an_option_that_a_model_without_a_size_lacks_is_told_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"pvt_v2_b0 refuses an option of model\.\* \(depht=2\): .*depht"):
        timm_classifier(attention=Dense, num_classes=10, channels=3, image_size=32, name="pvt_v2_b0", depht=2)


def test_the_table_of_families_is_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    assert [family for family, (name, *_) in FAMILIES.items() if f"`{name}`" not in text or family not in text] == []
    assert f"of {len(FAMILIES)} train" in text
