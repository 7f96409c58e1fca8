"""Decoding with a cache in models of transformers: the same tokens as without one."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.hosts.language_models import DECODERS, PADDED
from thresher import inject, sparsify
from thresher.attention import Attended, Call
from thresher.attention.dense import Dense
from thresher.hosts.__main__ import TOKENS, build


@pytest.mark.parametrize("attention", ["dense", "latte", "topk"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_equals_generation_without(name: str, attention: str) -> None:
    model = build(name)
    settings = {"theta": 0.5} if attention == "latte" else {"keys": 3} if attention == "topk" else {}
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


@pytest.mark.parametrize("attention", ["dense", "latte"])
def test_a_cache_of_fixed_size_is_masked(attention: str) -> None:
    model = build("Llama")
    sparsify(model, attention)
    ask = partial(model.generate, TOKENS, attention_mask=PADDED["left"], max_new_tokens=4, do_sample=False)
    wanted = ask(use_cache=False, eos_token_id=None)
    got = ask(cache_implementation="static", disable_compile=True, eos_token_id=None)
    assert torch.equal(got, wanted)


class Forgetful(Dense):
    """A mechanism whose rows depend on the queries before them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        return super().forward(q.cumsum(2), k, v, call)


def test_a_mechanism_that_needs_earlier_queries_refuses_a_cache() -> None:
    model = build("Llama")
    inject(model, Forgetful)
    model(TOKENS)
    with pytest.raises(ValueError, match=r"Forgetful cannot go on from cached keys.*use_cache=False"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None, use_cache=False)
