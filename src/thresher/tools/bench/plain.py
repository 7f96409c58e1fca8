"""Models as their libraries build them, with random weights, and a batch for each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Tensor], str]


def build_vit() -> Example:
    """Build a ViT of timm."""
    import timm

    net = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    return net, {"x": torch.randn(4, 3, 224, 224), "target": torch.randint(10, (4,))}, "vit_tiny_patch16_224, 4 images"


def build_bert() -> Example:
    """Build a BERT of transformers, with padding in its mask."""
    from transformers import BertConfig, BertForMaskedLM

    sizes: Any = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    net = BertForMaskedLM(BertConfig(vocab_size=1000, **sizes))
    tokens = torch.randint(1000, (4, 256))
    mask = torch.ones_like(tokens)
    mask[0, 200:] = 0
    return (
        net,
        {"input_ids": tokens, "attention_mask": mask, "target": tokens},
        "4 layers of width 256, 4 x 256 tokens, padded",
    )


def build_gpt2() -> Example:
    """Build a GPT-2 of transformers, causal, without padding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=512)
    tokens = torch.randint(1000, (2, 512))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "target": tokens}, "4 layers of width 256, 2 x 512 tokens"


PLAIN: Mapping[str, Callable[[], Example]] = {"timm ViT": build_vit, "BERT": build_bert, "GPT-2": build_gpt2}
