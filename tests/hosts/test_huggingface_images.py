"""Models that read images and text: blocks of image tokens see each other, whatever the text's causality says."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from thresher import sparsify
from thresher.hosts import mounted

LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 37}
IMAGE_TOKEN = 4
IDS = torch.arange(7, 31).view(2, 12)
IDS[:, 2:6] = IMAGE_TOKEN
TEXT = {"input_ids": IDS.clamp_min(7)}
WITH_IMAGES = {
    "input_ids": IDS,
    "token_type_ids": (IDS == IMAGE_TOKEN).long(),
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 400).view(2, 3, 20, 20).sin(),
}
SERVED = [
    ("dense", {}),
    ("topk", {"keys": 100}),
    ("latte", {"threshold": math.inf, "estimate": {"bits": "exact"}}),
]


@pytest.fixture(scope="module")
def gemma() -> nn.Module:
    torch.manual_seed(0)
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 99, "sliding_window": 8}
    vision = {"image_size": 20, "patch_size": 5, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=LAYERS | text | {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0},
        vision_config=LAYERS | vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
    )
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("attention", "settings"), SERVED, ids=[name for name, _ in SERVED])
@pytest.mark.parametrize("example", [None, WITH_IMAGES], ids=["mounted by text", "mounted by images"])
def test_images_are_read_as_the_plain_model_reads_them(
    gemma: nn.Module, example: Any, attention: str, settings: Any
) -> None:
    model: Any = copy.deepcopy(gemma)
    sparsify(model, attention, example_inputs=example, **settings)
    with torch.no_grad():
        for inputs in (TEXT, WITH_IMAGES):
            assert_close(model(**inputs).logits, gemma(**inputs).logits, atol=1e-5, rtol=1e-5)
        tokens = [of.generate(**WITH_IMAGES, max_new_tokens=4, do_sample=False) for of in (model, gemma)]
    assert torch.equal(*tokens)


def logits_after_a_change(model: nn.Module, at: int) -> tuple[Tensor, Tensor]:
    changed = WITH_IMAGES | {"input_ids": IDS.clone()}
    changed["input_ids"][:, at] = 50
    with torch.no_grad():
        return model(**WITH_IMAGES).logits, model(**changed).logits


def test_text_before_a_later_word_does_not_see_it(gemma: nn.Module) -> None:
    model = copy.deepcopy(gemma)
    sparsify(model, "latte", threshold=0.5)
    before, after = logits_after_a_change(model, at=8)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_what_example_inputs_do_not_reach_stays_dense(gemma: nn.Module) -> None:
    model = copy.deepcopy(gemma)
    sparsify(model, "latte")
    assert [name for name in mounted(model) if "vision" in name] == []
    model = copy.deepcopy(gemma)
    sparsify(model, "latte", example_inputs=WITH_IMAGES)
    assert len([name for name in mounted(model) if "vision" in name]) == 3


def test_a_mechanism_that_needs_the_order_is_refused_when_it_is_mounted(gemma: nn.Module) -> None:
    model = copy.deepcopy(gemma)
    with pytest.raises(ValueError, match=r"cannot run in Gemma3.*in the order of tokens"):
        sparsify(model, "smyrf", cluster=2, example_inputs=WITH_IMAGES)
    assert not mounted(model)
