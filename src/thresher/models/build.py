"""Create a network, then inject the mechanism."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from thresher.attention.base import MakeMechanism
from thresher.attention.options import check_integer, check_number
from thresher.hosts import inject

SHARES = {f"{what}_rate" for what in ("drop", "drop_path", "attn_drop", "proj_drop", "pos_drop", "patch_drop")}


def timm_classifier(
    *,
    attention: MakeMechanism,
    num_classes: int,
    channels: int,
    image_size: int,
    name: str = "vit_tiny_patch16_224",
    pretrained: bool = False,
    where: str | None = None,
    **architecture: Any,
) -> nn.Module:
    """Build an image classifier of timm's with another attention.

    Args:
        attention: Builds one mechanism for each attention module.
        num_classes: Number of logits.
        channels: Channels of the images.
        image_size: Side of the images in pixels.
        name: Any model name of timm whose attention a host knows.
        pretrained: Whether to load timm's weights (needs a network).
        where: Regular expression for the names of the attention modules to replace; all by default.
        **architecture: Passed to `timm.create_model`.

    Raises:
        ValueError: timm knows no such model or option, an option would load other files, or there is no attention
            to replace.
    """
    import timm

    if foreign := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"} & architecture.keys():
        raise ValueError(
            f"model.{min(foreign)} would load files that no checkpoint's config may name; init_from=PATH does"
        )
    _check_architecture(architecture, image_size)
    if not timm.is_model(name):
        family = timm.list_models(f"{name.partition('_')[0]}_*") or timm.list_models()
        close = ", ".join(difflib.get_close_matches(name, family, n=5, cutoff=0.3)) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; similar: {close}")
    try:
        net: nn.Module = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=channels,
            img_size=image_size,
            **architecture,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in architecture.items()) or "none"
        reason = str(error) or type(error).__name__
        raise ValueError(f"timm's {name} refuses an option of model.* ({given}): {reason}") from error
    inject(net, attention, where=where)
    return net


def token_classifier(
    *,
    attention: MakeMechanism,
    num_classes: int,
    vocabulary: int,
    length: int,
    dim: int = 64,
    depth: int = 2,
    num_heads: int = 2,
    ffn_dim: int = 128,
    dropout: float = 0.1,
    padding: int = 0,
    separator: int | None = None,
) -> nn.Module:
    """Build our own encoder with a classification head (see `transformer.py`).

    Args:
        attention: Builds one mechanism for each block.
        num_classes: Number of logits.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        dim: Width.
        depth: Number of blocks.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        dropout: Of embeddings and of each sublayer.
        padding: The token id that stands for nothing.
        separator: Of pairs of texts, the token id between the two; the second text's tokens get an embedding more.
    """
    from thresher.models.transformer import Classifier

    return Classifier(
        attention,
        num_classes=num_classes,
        vocabulary=vocabulary,
        length=length,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        ffn_dim=ffn_dim,
        dropout=dropout,
        padding=padding,
        separator=separator,
    )


def language_model(
    *,
    attention: MakeMechanism,
    vocabulary: int,
    length: int,
    padding: int,
    objective: str,
    encoder: MakeMechanism | None = None,
    decoder: MakeMechanism | None = None,
    cross: MakeMechanism | None = None,
    dim: int = 128,
    depth: int = 4,
    num_heads: int = 4,
    ffn_dim: int = 512,
    dropout: float = 0.1,
) -> nn.Module:
    """Build our own transformer for what is to be predicted (see `transformer.py`).

    Args:
        attention: Builds one mechanism for each attention that is not given one below.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        padding: The token id that stands for nothing.
        objective: "causal" builds a decoder, "masked" an encoder, "denoising" an encoder and a decoder.
        encoder: Builds the mechanisms of the encoder.
        decoder: Builds the mechanisms of the decoder's self attention.
        cross: Builds the mechanisms of the decoder's attention to the encoder.
        dim: Width.
        depth: Number of blocks, of encoder and decoder each.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        dropout: Of embeddings and of each sublayer.

    Raises:
        ValueError: A mechanism is given for a part that the objective does not have.
    """
    from thresher.models.transformer import EncoderDecoder, LanguageModel

    has = {"causal": ("decoder",), "masked": ("encoder",), "denoising": ("encoder", "decoder", "cross")}[objective]
    given = {"encoder": encoder, "decoder": decoder, "cross": cross}
    if idle := [name for name, make in given.items() if make is not None and name not in has]:
        raise ValueError(
            f"model.{idle[0]} would have no effect: data.objective={objective} builds {' and '.join(has)} only"
        )
    size: dict[str, Any] = {
        "vocabulary": vocabulary,
        "length": length,
        "padding": padding,
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "ffn_dim": ffn_dim,
        "dropout": dropout,
    }
    makes = {name: given[name] or attention for name in has}
    if objective == "denoising":
        return EncoderDecoder(makes["encoder"], makes["decoder"], makes["cross"], **size)
    return LanguageModel(makes[has[0]], causal=objective == "causal", **size)


def _check_architecture(architecture: Mapping[str, Any], image_size: int) -> None:
    """Check what timm would fail at without a name, or round away."""
    for name in ("patch_size", "embed_dim", "depth", "num_heads"):
        if name in architecture:
            check_integer(f"model.{name}", architecture[name], 1)
    for name in SHARES & architecture.keys():
        check_number(f"model.{name}", architecture[name], least=0.0, below=1.0)
    dim, heads, patch = (architecture.get(name) for name in ("embed_dim", "num_heads", "patch_size"))
    if dim and heads and dim % heads:
        raise ValueError(f"model.embed_dim={dim} cannot be shared evenly by model.num_heads={heads}")
    if patch and image_size % patch:
        raise ValueError(
            f"model.patch_size={patch} does not divide images of {image_size} pixels: the last "
            f"{image_size % patch} of each row and column would be cut off; choose a divisor, or data.image_size"
        )
