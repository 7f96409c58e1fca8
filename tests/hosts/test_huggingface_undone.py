"""Models of transformers that are saved, loaded and given back as they were."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.hosts.language_models import FIRST, SECOND, TEXT
from tests.hosts.models import same_state
from tests.hosts.spy import Spy
from thresher import densify, inject, sparsify
from thresher.attention import Mechanism
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, TOKENS, build
from thresher.hosts.huggingface.host import from_pretrained
from thresher.hosts.recording import call_model


@pytest.mark.parametrize("name", ["BERT", "ViT", "Llama", "T5"])
def test_a_saved_model_comes_back_with_its_thresholds(name: str, tmp_path: Path) -> None:
    model = build(name)
    sparsify(model, "latte", where=FIRST, threshold=0.5)
    sparsify(model, "latte", where=f"{SECOND}(?!.*EncDec)", threshold=float("inf"))
    for parameter, x in model.named_parameters():
        if "thresholds" in parameter:
            x.data += torch.arange(4.0)
    wanted = call_model(model, MODELS[name].inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert mounted(loaded) == mounted(model)
    assert same_state(loaded, model)
    assert torch.equal(call_model(loaded, MODELS[name].inputs)[0], wanted)
    loaded.save_pretrained(tmp_path)
    assert mounted(from_pretrained(str(tmp_path))) == mounted(model)


def test_a_file_without_thresholds_is_refused(tmp_path: Path) -> None:
    model = build("BERT")
    sparsify(model, "latte", threshold=0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    save_file({key: x for key, x in saved.items() if "thresholds" not in key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks their parameters: .*mechanism\.thresholds\.base"):
        from_pretrained(str(tmp_path))


def test_a_file_without_mechanisms_or_of_unknown_ones_is_refused(tmp_path: Path) -> None:
    model = build("BERT")
    sparsify(model, "latte")
    densify(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without mechanisms"):
        from_pretrained(str(tmp_path))
    inject(model, Spy)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no attention"):
        from_pretrained(str(tmp_path))


@pytest.mark.parametrize("attention", ["dense", "latte", "mean"])
@pytest.mark.parametrize("name", [*TEXT, "ViT"])
def test_densify_gives_back_the_model_that_was(name: str, attention: str) -> None:
    plain, model = build(name), build(name)
    before = model.config.to_dict()
    sparsify(model, attention, where=FIRST)
    sparsify(model, attention, where=SECOND)
    copied = copy.deepcopy(model)
    densify(copied)
    assert len(mounted(model)) > 1
    densify(model)
    for restored in (copied, model):
        assert restored.config.to_dict() == before
        assert restored.config._attn_implementation == "sdpa"
        assert same_state(restored, plain)
        assert torch.equal(call_model(restored, MODELS[name].inputs)[0], call_model(plain, MODELS[name].inputs)[0])
        assert not any(isinstance(m, Mechanism) for m in restored.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in restored.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_choice_of_attention_is_given_back(attention: str) -> None:
    model = build("GPT-2")
    model.set_attn_implementation(attention)
    wanted = model(TOKENS)[0]
    sparsify(model, "dense")
    assert_close(model(TOKENS)[0], wanted, atol=1e-5, rtol=1e-5)
    densify(model)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(TOKENS)[0], wanted)
