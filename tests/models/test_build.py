"""Networks that a config describes: sizes that timm would fail at without a name, or round away, are told by theirs."""

from typing import Any

import pytest

from thresher.attention.dense import Dense
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
        ({"name": "vit_tinny"}, r"timm has no model 'vit_tinny'; similar: .*vit_tiny_"),
        ({"name": "swinn_tiny"}, r"timm has no model 'swinn_tiny'; similar: swin_"),
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
