"""Decoding with a cache in models of transformers: the same tokens as without one."""

from functools import partial
from inspect import signature

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, LlamaModel, MistralConfig, MistralForCausalLM

from tests.hosts.language_models import DECODERS, PADDED
from thresher import coded_cache, densify, inject, sparsify
from thresher.attention import Call, KeyCodes, Prepared, available, find
from thresher.attention.dense import Dense
from thresher.attention.latte.mechanism import Latte
from thresher.attention.shared import sums
from thresher.hosts.__main__ import TEXT, TOKENS, build
from thresher.hosts.huggingface.cache import CodedLayer


@pytest.mark.parametrize("attention", ["dense", "latte", "topk"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_equals_generation_without(name: str, attention: str) -> None:
    model = build(name)
    settings = {"threshold": 0.5} if attention == "latte" else {"keys": 3} if attention == "topk" else {}
    sparsify(model, attention, **settings)
    ask = partial(model.generate, TOKENS, attention_mask=PADDED["left"], max_new_tokens=8, do_sample=False)
    one, other = (ask(use_cache=cached, eos_token_id=None) for cached in (True, False))
    assert one.shape[1] > 8
    assert torch.equal(one, other)


@pytest.mark.parametrize("attention", ["dense", "latte", "topk"])
def test_a_prompt_may_come_in_parts(attention: str) -> None:
    model = build("Llama")
    sparsify(model, attention)
    mask = PADDED["left"]
    whole = model(TOKENS, attention_mask=mask)[0]
    first = model(TOKENS[:, :4], attention_mask=mask[:, :4])
    cache = first.get("cache", first.get("past_key_values"))
    name = "cache" if "cache" in first else "past_key_values"
    second = model(TOKENS[:, 4:], attention_mask=mask, **{name: cache})[0]
    assert_close(second, whole[:, 4:], atol=1e-5, rtol=1e-5)


SETTINGS = {"latte": {"threshold": 0.5}, "topk": {"keys": 3}, "smyrf": {"cluster": 2}}
SERVED = [name for name in available() if name != "mca"]


@pytest.mark.parametrize("attention", SERVED)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_cache_of_fixed_size_with_free_slots_gives_the_same_tokens(name: str, attention: str) -> None:
    model = build(name)
    torch.manual_seed(0)
    sparsify(model, attention, **SETTINGS.get(attention, {}))
    for padding in ("none", "left"):
        ask = partial(model.generate, TOKENS, attention_mask=PADDED[padding], max_new_tokens=5, do_sample=False)
        ask = partial(ask, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        got, wanted = ask(cache_implementation="static", disable_compile=True), ask(use_cache=False)
        assert torch.equal(got.sequences, wanted.sequences)
        assert_close(torch.stack(got.logits), torch.stack(wanted.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", SERVED)
def test_a_cache_that_drops_keys_gives_the_same_tokens_or_is_refused(attention: str) -> None:
    config = MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4, pad_token_id=0)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    sparsify(model, attention, **SETTINGS.get(attention, {}))
    ask = partial(model.generate, TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    wanted = ask(use_cache=False)
    if not find(attention).slides:
        with pytest.raises(ValueError, match=r"a cache that keeps 4 has dropped some; pass use_cache=False"):
            ask()
        part = model(TOKENS[:, :2])
        name = "cache" if "cache" in part else "past_key_values"
        rest = model(TOKENS[:, 2:3], **{name: part[name]}).logits  # of three tokens none is dropped
        assert_close(rest, model(TOKENS[:, :3]).logits[:, 2:], atol=1e-5, rtol=1e-5)
        return
    assert torch.equal(ask(), wanted)


CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_codes_of_keys_equals_generation_without(
    name: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    sparsify(model, "latte", threshold=0.5)
    ask = partial(model.generate, TOKENS, attention_mask=PADDED["left"], max_new_tokens=8, num_beams=beams)
    wanted = ask(do_sample=False, eos_token_id=None)
    coded: list[int] = []
    encode_keys = Latte.encode_keys

    def counted(self: Latte, k: Tensor) -> KeyCodes | None:
        coded.append(k.shape[2])
        return encode_keys(self, k)

    monkeypatch.setattr(Latte, "encode_keys", counted)
    cache = coded_cache(model)
    coded.clear()
    assert torch.equal(ask(do_sample=False, eos_token_id=None, **{CACHE: cache}), wanted)
    own = getattr(cache, "self_attention_cache", cache)
    layers = sum(isinstance(layer, CodedLayer) for layer in own.layers)
    assert coded == [coded[0]] * layers + [1] * 7 * layers


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["latte", "topk"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_sums_for_tails_equals_generation_without(
    name: str, attention: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    sparsify(model, attention, tail="mean", **({"threshold": 0.5} if attention == "latte" else {"keys": 0.3}))
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    ask = partial(model.generate, TOKENS, attention_mask=PADDED["left"], **options)
    wanted = ask()
    read: list[int] = []
    sum_tokens = sums.sum_tokens

    def counted(tokens: Tensor, shown: Tensor | None) -> Tensor:
        read.append(tokens.shape[2])
        return sum_tokens(tokens, shown)

    monkeypatch.setattr(sums, "sum_tokens", counted)
    cache = coded_cache(model)
    assert torch.equal(ask(**{CACHE: cache}), wanted)
    own = getattr(cache, "self_attention_cache", cache)
    layers = sum(isinstance(layer, CodedLayer) for layer in own.layers)
    if name == "T5":
        assert not read, "its position bias leaves decoding to PyTorch, which reads no sums"
    else:
        assert set(read[2 * layers :]) == {1}, "later steps read only their own token"


def test_codes_go_with_the_keys_they_were_made_of() -> None:
    model = build("Llama")
    sparsify(model, "latte", threshold=0.5)
    cache = coded_cache(model)
    model(TOKENS, **{CACHE: cache})
    for change in (
        lambda: cache.crop(-2),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        change()
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys, layer.values, index)
        mask = torch.ones(2 * (len(cache.layers[0].keys) // 2), cache.get_seq_length() + 1, dtype=torch.long)
        given = {"input_ids": TOKENS[:1, :1].expand(len(mask), 1), "attention_mask": mask}
        assert torch.equal(model(**given, **{CACHE: cache})[0], model(**given, **{CACHE: plain})[0])


def test_codes_of_another_mechanism_are_not_used() -> None:
    model = build("Llama")
    sparsify(model, "latte", threshold=0.5)
    cache = coded_cache(model)
    model(TOKENS, **{CACHE: cache})
    densify(model)
    sparsify(model, "latte", threshold=0.5, estimate={"bits": 8})
    plain = DynamicCache(config=model.config)
    model(TOKENS, **{CACHE: plain})
    for index, layer in enumerate(cache.layers):
        layer.keys, layer.values = plain.layers[index].keys, plain.layers[index].values
        layer.keys._codes = layer.mechanism, layer.mechanism.encode_keys(layer.keys)
    given = {"input_ids": TOKENS[:, :1]}
    assert torch.equal(model(**given, **{CACHE: cache})[0], model(**given, **{CACHE: plain})[0])


def test_a_cache_without_any_codes_is_refused() -> None:
    for attention, options in (("topk", {"tail": "none"}), ("dense", {}), ("smyrf", {"tail": "mean"})):
        model = build("Llama")
        sparsify(model, attention, **options)
        with pytest.raises(ValueError, match=r"no attention of this LlamaForCausalLM keeps codes or sums.*own cache"):
            coded_cache(model)
    with pytest.raises(ValueError, match="no attention of this BertForMaskedLM"):
        coded_cache(build("BERT"))


class Forgetful(Dense):
    """A mechanism whose rows depend on the queries before them."""

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Prepared:
        return super().prepare(q.cumsum(2), k, v, call)


def test_a_mechanism_that_needs_earlier_queries_refuses_a_cache() -> None:
    model = build("Llama")
    inject(model, Forgetful)
    model(TOKENS)
    with pytest.raises(ValueError, match=r"Forgetful cannot continue from cached keys.*use_cache=False"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None, use_cache=False)
