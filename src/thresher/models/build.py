"""Build a network, then inject the mechanism."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thresher.attention.mechanism import MakeMechanism
from thresher.attention.options import check_integer, check_number
from thresher.hosts import inject
from thresher.hosts.core import is_mountable, load_hosts
from thresher.hosts.recording import evaluation_mode

SHARES = {f"{what}_rate" for what in ("drop", "drop_path", "attn_drop", "proj_drop", "pos_drop", "patch_drop")}


def timm_classifier(
    *,
    attention: MakeMechanism,
    num_classes: int,
    channels: int,
    image_size: int | Sequence[int],
    name: str = "vit_tiny_patch16_224",
    pretrained: bool = False,
    where: str | None = None,
    **architecture: Any,
) -> nn.Module:
    """Build an image classifier of timm with another attention.

    Args:
        attention: Builds one mechanism for each attention module.
        num_classes: Number of logits.
        channels: Channels of the images.
        image_size: Side of the images in pixels, or their height and width.
        name: Model name of timm; a host must know its attention by class or by watching it process an image.
        pretrained: Whether to load the weights of timm (needs a network connection).
        where: Regular expression for the names of the attention modules to replace; all by default.
        **architecture: Passed to `timm.create_model`.

    Raises:
        ValueError: timm has no such model or option, an option would load other files, or there is no attention
            to replace.
    """
    import timm

    if foreign := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"} & architecture.keys():
        raise ValueError(
            f"model.{min(foreign)} would load files that no checkpoint's config may name; init_from=PATH does"
        )
    _check_architecture(architecture, image_size)
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; did you mean {' or '.join(_find_similar(name))}?")
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    build = partial(timm.create_model, name, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    net = _build_for_size(name, build, size, architecture)
    load_hosts()
    known_by_class = any(is_mountable(module) or isinstance(module, nn.MultiheadAttention) for module in net.modules())
    examples = None if known_by_class else _build_examples(name, net, channels, size)
    inject(net, attention, where=where, example_inputs=examples)
    return net


def _find_similar(name: str) -> list[str]:
    """Find the models of timm with the nearest names, in the family of the name if timm has it."""
    import timm

    first = name.partition("_")[0]
    family = timm.list_models(f"{first}_*") or timm.list_models(f"{first.rstrip('0123456789')}*") or timm.list_models()
    return difflib.get_close_matches(name, family, n=5, cutoff=0.3) or family[:5]


def _build_for_size(
    name: str, build: partial[nn.Module], size: tuple[int, int], architecture: Mapping[str, Any]
) -> nn.Module:
    """Build a model for images of this size, whether or not the size is an argument of the model."""
    try:
        return build(img_size=size[0] if size[0] == size[1] else size, **architecture)
    except (TypeError, AssertionError, RuntimeError) as error:
        if not isinstance(error, TypeError) or "'img_size'" not in str(error):
            raise _build_error(name, architecture, error) from error
    try:
        net = build(**architecture)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise _build_error(name, architecture, error) from error
    _build_examples(name, net, build.keywords["in_chans"], size)
    return net


def _build_error(name: str, architecture: Mapping[str, Any], error: Exception) -> ValueError:
    given = ", ".join(f"{key}={value}" for key, value in architecture.items()) or "none"
    reason = str(error) or type(error).__name__
    return ValueError(f"timm's {name} refuses an option of model.* ({given}): {reason}")


def _build_examples(name: str, net: nn.Module, channels: int, size: tuple[int, int]) -> Tensor:
    """Build example images for hosts that watch the model; run the model on them once.

    Raises:
        ValueError: The model cannot process images of this size.
    """
    images = torch.zeros(2, channels, *size)
    try:
        with evaluation_mode(net):
            net(images)
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
        own = getattr(net, "default_cfg", {}).get("input_size", ("?", "?"))[-1]
        raise ValueError(
            f"timm's {name} cannot take images of {_format_size(size)} pixels ({str(error) or type(error).__name__}); "
            f"it is made for {own}: set data.image_size={own}, or another model.name"
        ) from error
    return images


def _format_size(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


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
    """Build the encoder of `transformer.py` with a classification head.

    Args:
        attention: Builds one mechanism for each block.
        num_classes: Number of logits.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        dim: Width.
        depth: Number of blocks.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        dropout: Dropout of embeddings and of each sublayer.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
        separator: Token id between the two texts of a pair; tokens of the second text get an additional embedding.
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
    """Build the transformer of `transformer.py` for an objective.

    Args:
        attention: Builds the mechanisms of all attentions that have no argument of their own below.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
        objective: "causal" builds a decoder, "masked" an encoder, "denoising" an encoder and a decoder.
        encoder: Builds the mechanisms of the encoder.
        decoder: Builds the mechanisms of the decoder's self attention.
        cross: Builds the mechanisms of the decoder's attention to the encoder.
        dim: Width.
        depth: Number of blocks of the encoder and of the decoder.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        dropout: Dropout of embeddings and of each sublayer.

    Raises:
        ValueError: An argument names a part that the objective does not have.
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


def _check_architecture(architecture: Mapping[str, Any], image_size: int | Sequence[int]) -> None:
    """Check options for which timm would give an unclear error or would round."""
    for name in ("patch_size", "embed_dim", "depth", "num_heads"):
        if name in architecture:
            check_integer(f"model.{name}", architecture[name], 1)
    for name in SHARES & architecture.keys():
        check_number(f"model.{name}", architecture[name], least=0.0, below=1.0)
    dim, heads, patch = (architecture.get(name) for name in ("embed_dim", "num_heads", "patch_size"))
    if dim and heads and dim % heads:
        raise ValueError(f"model.embed_dim={dim} cannot be shared evenly by model.num_heads={heads}")
    sides = [image_size] if isinstance(image_size, int) else image_size
    for side, places in zip(
        sides, ["each row and column"] if len(sides) == 1 else ["each column", "each row"], strict=True
    ):
        if patch and side % patch:
            raise ValueError(
                f"model.patch_size={patch} does not divide images of {side} pixels: the last "
                f"{side % patch} of {places} would be cut off; choose a divisor, or data.image_size"
            )
