"""`output_attentions=True` in models of transformers: the weights that were used, whatever the mechanism."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.language_models import FIRST, PADDED, TEXT
from thresher import ComputeMeter, densify, sparsify
from thresher.attention import Mechanism, available
from thresher.hosts.__main__ import MODELS, TOKENS, build
from thresher.hosts.recording import call_model

ASKED = {"output_attentions": True}


def attentions(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    return {key: maps for key, maps in call_model(model, inputs | ASKED).items() if key.endswith("attentions")}


@pytest.mark.parametrize("where", [None, FIRST], ids=["all", "first"])
@pytest.mark.parametrize("name", [*TEXT, "ViT"])
def test_weights_are_those_of_eager_attention(name: str, where: str | None) -> None:
    plain, hosted = build(name), build(name)
    plain.set_attn_implementation("eager")
    sparsify(hosted, "dense", where=where)
    wanted, got = attentions(plain, MODELS[name].inputs), attentions(hosted, MODELS[name].inputs)
    assert wanted
    assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert call_model(hosted, MODELS[name].inputs).get("attentions") is None
    densify(hosted)
    call_model(hosted, MODELS[name].inputs | {"output_attentions": False})


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("attention", available())
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_outputs_are_sums_of_values_by_these_weights(name: str, attention: str, training: bool) -> None:
    model = build(name).train(training)
    sparsify(model, attention, **({"allow_noncausal_budget": True} if attention == "mca" else {}))
    inputs = {"input_ids": TOKENS, "attention_mask": PADDED["right"], "use_cache": False}
    if attention == "mca" and training:
        with pytest.raises(ValueError, match=r"Mca samples its values in training.*model\.eval\(\)"):
            attentions(model, inputs)
        return
    seen: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.register_forward_hook(lambda _, args, attended: seen.append((args[2], attended.out)))
    torch.manual_seed(3)
    plain = call_model(model, inputs)
    seen.clear()
    torch.manual_seed(3)
    asked = call_model(model, inputs | ASKED)
    assert torch.equal(asked[0], plain[0])
    assert len(asked.attentions) == len(seen) == 2
    for weights, (v, out) in zip(asked.attentions, seen, strict=True):
        assert weights.shape == (2, 4, 7, 7)
        if attention != "mca":
            assert_close(weights @ v.repeat_interleave(4 // v.shape[1], 1), out, atol=1e-4, rtol=1e-3)
    assert not weights[1, :, :, 4:].any()


def test_dropped_weights_are_those_of_the_same_draw() -> None:
    config = MODELS["BERT"].build().config
    config.attention_probs_dropout_prob = 0.4
    torch.manual_seed(0)
    model = transformers.BertModel(config).train()
    partly = copy.deepcopy(model)
    sparsify(model, "dense")
    (weights, _) = model(TOKENS, **ASKED).attentions
    assert 0.2 < (weights == 0).float().mean() < 0.6
    sparsify(partly, "dense", where=FIRST)
    with pytest.raises(ValueError, match="BertSelfAttention drops attention weights in training"):
        partly(TOKENS, **ASKED)
    assert partly(TOKENS).attentions is None


def test_one_call_is_metered_and_the_price_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("BERT")
    sparsify(model, "latte")
    meter = ComputeMeter(model)
    for _ in range(2):
        with meter:
            model(TOKENS, **ASKED)
        assert len(meter.calls) == 2
    assert caplog.text.count("each attention is computed twice") == 1


def test_a_configuration_may_ask_and_a_call_may_decline() -> None:
    config = MODELS["BERT"].build().config
    config._attn_implementation = "eager"
    config.output_attentions = True
    model = transformers.BertModel(config).eval()
    sparsify(model, "topk", keys=2, tail="none")
    assert [(maps > 0).sum(-1).max().item() for maps in model(TOKENS).attentions] == [2, 2]
    assert model(TOKENS, output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="exactly one of"):
        model(**ASKED)
    assert model(TOKENS, output_attentions=False).attentions is None


def test_generation_returns_weights_of_every_step() -> None:
    model = build("Llama")
    sparsify(model, "topk", keys=3, tail="none")
    asked = ASKED | {"return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 3}
    steps = model.generate(TOKENS, **asked).attentions
    assert [maps[0].shape for maps in steps] == [(2, 4, 7, 7), (2, 4, 1, 8), (2, 4, 1, 9)]
    assert all((maps[0][:, :, -1] > 0).sum(-1).eq(3).all() for maps in steps)
