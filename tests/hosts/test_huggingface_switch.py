"""Whoever chooses another attention for a model that holds mechanisms is told, and `mounted` tells the truth."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache

from thresher import densify, sparsify
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, PICTURES, TOKENS, build
from thresher.hosts.recording import call_model

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    text, vision = SIZE | {"vocab_size": 64, "eos_token_id": 2}, SIZE | {"image_size": 16, "patch_size": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    return model, {"input_ids": TOKENS, "pixel_values": PICTURES}


def subject(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return clip() if name == "CLIP" else (build(name), MODELS[name].inputs)


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "Llama", "T5", "CLIP"])
def test_a_switch_is_refused_at_the_next_forward_until_somebody_decides(name: str, choice: str) -> None:
    model, inputs = subject(name)
    plain = copy.deepcopy(model)
    names = sparsify(model, "topk", keys=2, example_inputs=inputs)
    wanted, before = call_model(model, inputs)[0], mounted(model)
    model.set_attn_implementation(choice)
    for what in mounted(model).values():
        assert what.endswith(f" (not asked: attn_implementation is {choice!r})")
    with pytest.raises(ValueError, match=rf"mounted in this .* attn_implementation is '{choice}'; call densify\(\) fi"):
        call_model(model, inputs)
    model.set_attn_implementation("thresher")
    assert mounted(model) == before
    assert torch.equal(call_model(model, inputs)[0], wanted)
    model.set_attn_implementation(choice)
    assert densify(model) == names
    assert model.config._attn_implementation == choice
    assert_close(call_model(model, inputs)[0], call_model(plain, inputs)[0], atol=1e-5, rtol=1e-5)


def test_a_part_without_mechanisms_may_be_switched() -> None:
    model, inputs = clip()
    sparsify(model, "topk", keys=2, where="vision", example_inputs=inputs)
    wanted = call_model(model, inputs)[0]
    model.set_attn_implementation({"text_config": "eager"})
    assert model.config.text_config._attn_implementation == "eager"
    assert_close(call_model(model, inputs)[0], wanted)
    model.set_attn_implementation({"vision_config": "eager"})
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"):
        call_model(model, inputs)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "T5", "BART"])
def test_caches_go_by_their_older_name_too(name: str) -> None:
    model = build(name)
    sparsify(model, "topk", keys=2)
    outputs = []
    for keyword in ("cache", "past_key_values"):
        cache: Any = DynamicCache(config=model.config)
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        inputs = MODELS[name].inputs
        key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        for part in (inputs[key][:, :3], inputs[key][:, 3:]):
            out = model(**inputs | {key: part, keyword: cache, "use_cache": True})
        outputs.append(out[0])
        assert cache.get_seq_length() == inputs[key].shape[1]
    assert torch.equal(*outputs)
