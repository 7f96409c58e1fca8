"""Small models of timm's to mount mechanisms into."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn

from thresher.testing.inputs import noise_like

SIZE = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": partial(timm.create_model, "vit_tiny_patch16_224", **SIZE),
    "deit, distilled": partial(timm.create_model, "deit_tiny_distilled_patch16_224", **SIZE),
    "deit-3": partial(timm.create_model, "deit3_small_patch16_224", **SIZE),
    "dinov2": partial(timm.create_model, "vit_small_patch14_dinov2", **SIZE),
    "dinov2, registers": partial(timm.create_model, "vit_small_patch14_reg4_dinov2", **SIZE),
    "qk norm": partial(timm.create_model, "vit_tiny_patch16_224", qk_norm=True, **SIZE),
    "attention norm": partial(timm.create_model, "vit_tiny_patch16_224", scale_attn_norm=True, **SIZE),
}
BLOCKS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def build(name: str = "vit", **changes: object) -> nn.Module:
    """Build a small model in evaluation mode, with weights that make its attention anything but uniform."""
    torch.manual_seed(0)
    model = MODELS[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise_like(parameter, 0.2)
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return noise_like(torch.empty(batch, 1, 16, 16))


def tokens(n: int = 6) -> Tensor:
    return noise_like(torch.empty(2, n, 32))


def loss_of(model: nn.Module) -> Tensor:
    out = model(images())
    return sum((x * noise_like(x)).sum() for x in (out if isinstance(out, tuple) else (out,)))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
