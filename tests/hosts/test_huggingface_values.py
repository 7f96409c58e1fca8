"""MCA in models of transformers: it learns what values are projected from."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from thresher import densify, sparsify
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, TOKENS, build
from thresher.hosts.recording import call_model


@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "ViT", "GPT-2", "Llama", "T5", "BART"])
def test_a_mechanism_that_samples_the_value_projection_learns_what_it_was(name: str) -> None:
    plain, hosted = build(name), build(name)
    sparsify(hosted, "mca", alpha=1e-6, allow_noncausal_budget=True)
    losses = [call_model(model, MODELS[name].inputs)[0].square().mean() for model in (plain, hosted)]
    assert_close(*losses, atol=1e-4, rtol=1e-4)
    for loss in losses:
        loss.backward()
    for (parameter_name, old), new in zip(plain.named_parameters(), hosted.parameters(), strict=True):
        if old.grad is not None:
            assert_close(new.grad, old.grad, atol=1e-3, rtol=1e-3, msg=lambda m, n=parameter_name: f"{n}: {m}")


def test_a_copy_samples_the_value_projection_of_its_own() -> None:
    model = build("BERT")
    sparsify(model, "mca", alpha=1e-6)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter *= 1.5
    wanted = model(TOKENS)[0]
    got = copied(TOKENS)[0]
    assert torch.equal(model(TOKENS)[0], wanted)
    densify(copied)
    assert_close(got, copied(TOKENS)[0], atol=1e-3, rtol=1e-3)


def test_a_value_projection_that_was_exchanged_is_noticed() -> None:
    model = build("BERT")
    (place, *_) = sparsify(model, "mca")
    model.get_submodule(place).value = nn.Sequential(model.get_submodule(place).value, nn.Tanh())
    with pytest.raises(ValueError, match="value was replaced"):
        model(TOKENS)


def test_values_that_no_layer_projected_are_refused() -> None:
    model = build("Qwen3")
    for layer in model.model.layers:
        layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, nn.Tanh())
    with pytest.raises(ValueError, match=r"Mca needs to know what values.*Qwen3Attention"):
        sparsify(model, "mca", allow_noncausal_budget=True)
    assert not mounted(model)
