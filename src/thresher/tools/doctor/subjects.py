"""A model by its name, with the changes that its masks must hide.

Runs, checkpoints and exports are not trusted (see `checkpoints.trust`). A function that the user names is imported and
called.
"""

import difflib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import timm
import torch
from torch import Tensor, nn

from thresher.attention import Mechanism
from thresher.checkpoints.format import is_saved_by_transformers
from thresher.checkpoints.rebuild import load_model
from thresher.hosts.recording import call_model
from thresher.models.transformer import Classifier, EncoderDecoder, LanguageModel, Stack
from thresher.testing.models import NOISE, Change, Inputs, Subject
from thresher.tools.doctor.masks import hides_future

HIDDEN_WHERE_TRUE = ("src_key_padding_mask", "key_padding_mask", "memory_key_padding_mask")
HUGGING_FACE = {"encoder": "input_ids", "decoder": "decoder_input_ids"}


def load_subject(name: str, tokens: int, conf: Path) -> Subject:
    """Load the model that a name stands for.

    Args:
        name: A run, checkpoint or export; `timm:NAME` or `hf:NAME`, where the prefix may be left out; or
            `package.module:function`, which returns a model, or a model and example inputs.
        tokens: Length of the texts that it gets, if it takes as many.
        conf: Folder of configs; they list what a checkpoint may name.

    Raises:
        ValueError: There is no such model, or its inputs are unknown.
        FileNotFoundError: There is no such file, or no such model of transformers.
    """
    kind, colon, rest = name.partition(":")
    path = Path(name)
    if kind == "timm" and colon:
        return load_timm(rest)
    if kind == "hf" and colon:
        return load_transformers(rest, tokens)
    if path.exists() and not is_saved_by_transformers(path):
        return load_checkpoint(path, tokens, conf)
    if path.exists():
        return load_transformers(name, tokens)
    if kind == "package":
        return load_transformers(name, tokens)
    if colon:
        return call_function(name)
    if timm.is_model(name):
        return load_timm(name)
    if "/" not in name and path.suffix not in (".ckpt", ".pt"):
        close = difflib.get_close_matches(name, timm.list_models(), n=2)
        try:
            return load_transformers(name, tokens)
        except FileNotFoundError as error:
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"timm has no model {name!r}{hint} And {error}") from error
    return load_transformers(name, tokens)


def load_timm(name: str) -> Subject:
    """Build a model of timm with random weights.

    Raises:
        ValueError: There is none of this name.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}{hint}")
    net = timm.create_model(name, pretrained=False)
    size = timm.data.resolve_model_data_config(net)["input_size"]
    return build_image_subject(spread_weights(net), size)


def build_image_subject(net: nn.Module, size: tuple[int, ...], mounted: bool = False) -> Subject:
    """Give a model images; where it takes a mask of tokens, hide the lowest quarter of the patches.

    Args:
        net: The model.
        size: Channels, height and width.
        mounted: Whether it holds mechanisms already.
    """
    net = net.eval()
    images = _draw_noise(2, *size)
    other = torch.cat([_draw_noise(1, *size, seed=2), images[1:]])
    changes = [Change("neighbours", images, other, None, torch.tensor([False, True]))]
    features = getattr(net, "forward_features", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if features is None or grid is None or "attn_mask" not in inspect.signature(features).parameters:
        return Subject(net, lambda x: call_model(net, x), changes, example_inputs=images, mounted=mounted)
    with torch.no_grad():
        count = features(images[:1]).shape[1]
    hidden = max(grid[0] // 4, 1) * grid[1]
    visible = torch.arange(count) < count - hidden
    padded = images.clone()
    padded[:, :, -(max(grid[0] // 4, 1) * size[1] // grid[0]) :] = NOISE * _draw_noise(1, seed=3)
    real = visible.expand(2, -1)
    changes = [
        Change("padding", images, padded, real, None),
        Change("neighbours", images, other, torch.tensor([[False], [True]]).expand_as(real), None),
    ]
    return Subject(
        net,
        lambda x: features(x, attn_mask=visible[None, None, None]),
        changes,
        example_inputs=images,
        mounted=mounted,
    )


def load_transformers(name: str, tokens: int) -> Subject:
    """Build a model of transformers from its configuration, with random weights.

    Raises:
        ValueError: It takes neither texts nor images.
        FileNotFoundError: There is none of this name.
    """
    try:
        from thresher.models.huggingface import build_bare_model
    except ImportError as error:
        raise ValueError(f"{name!r} may be a model of transformers: pip install 'thresher[hf]'") from error
    net = spread_weights(build_bare_model(name)).eval()
    config = net.config
    if net.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = vision.image_size if isinstance(vision.image_size, tuple | list) else (vision.image_size,) * 2
        size = (2, vision.num_channels, *side)
        images, other = {"pixel_values": _draw_noise(*size)}, {"pixel_values": _draw_noise(*size)}
        other["pixel_values"][0] = _draw_noise(*size[1:], seed=2)
        change = Change("neighbours", images, other, None, torch.tensor([False, True]))
        return Subject(net, lambda x: net(**x)[0], [change])
    if net.main_input_name != "input_ids":
        raise ValueError(
            f"{type(net).__name__} takes {net.main_input_name}: name a function package.module:function that returns "
            "it with example inputs"
        )
    text = config.get_text_config()
    length = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
    ids, visible = _draw_texts(length, text.vocab_size, config.pad_token_id)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": visible.long()}
    written = "input_ids"
    if config.is_encoder_decoder:
        written = "decoder_input_ids"
        inputs[written] = _draw_ids(length // 2, config.get_text_config(decoder=True).vocab_size, config.pad_token_id)
    cached = {"use_cache": False} if hasattr(text, "use_cache") else {}
    return Subject(net, lambda x: net(**x, **cached)[0], _build_text_changes(inputs, "input_ids", written, visible))


def load_checkpoint(path: Path, tokens: int, conf: Path) -> Subject:
    """Load a trained network with its own attention.

    Raises:
        ValueError: It is damaged or not trusted, or the network takes neither tokens nor images.
        FileNotFoundError: There is no checkpoint.
    """
    net = load_model(path, conf=conf)
    stacks = [m for m in net.modules() if isinstance(m, Stack)]
    inner = getattr(net, "model", None)
    if stacks:
        length, vocabulary, padding = len(stacks[0].positions), stacks[0].embedding.num_embeddings, stacks[0].padding
    elif inner is not None and hasattr(inner, "config"):
        text = inner.config.get_text_config()
        length, vocabulary = getattr(text, "max_position_embeddings", None) or tokens, text.vocab_size
        padding = int(net.padding)  # type: ignore[arg-type]
    else:
        return build_image_subject(net, _find_image_size(net), mounted=True)
    length = min(tokens, length)
    ids, visible = _draw_texts(length, vocabulary, padding)
    two = isinstance(net, EncoderDecoder) or bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    inputs = {"tokens": ids} | ({"target": _draw_ids(length // 2, vocabulary, padding)} if two else {})
    written = "target" if two else "tokens"
    if isinstance(net, EncoderDecoder):
        changes = _build_text_changes(inputs, "tokens", written, visible)
        return Subject(net, lambda x: net(x["tokens"], x["target"]), changes, mounted=True)
    causal = isinstance(net, LanguageModel) or not isinstance(net, Classifier)
    changes = _build_text_changes(inputs, "tokens", written, visible)
    if not (causal and hides_future(net)):
        changes = [change for change in changes if change.kind != "future"]
    return Subject(net, lambda x: net(*x.values()), changes, mounted=True)


def _find_image_size(net: nn.Module) -> tuple[int, ...]:
    """Find channels, height and width that a model of timm was built for.

    Raises:
        ValueError: The model does not store them.
    """
    embed = getattr(net, "patch_embed", None)
    side, first = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    if side is None or not isinstance(first, nn.Conv2d):
        raise ValueError(
            f"{type(net).__name__} does not say what images it takes: name a function package.module:function that "
            "returns it with example inputs"
        )
    return (first.in_channels, *side)


def call_function(name: str) -> Subject:
    """Call a function of the user that returns a model and example inputs, two examples or more.

    Padding is tested where the inputs are a dict with attention_mask, as in transformers, or src_key_padding_mask, as
    in PyTorch.

    Raises:
        ValueError: It cannot be imported, or returns something else.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = resolve_name(name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network={name}: {error}") from error
    net, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(net, nn.Module) or inputs is None:
        raise ValueError(
            f"network={name} must return a torch.nn.Module and example inputs (a tensor, a tuple or a dict), not "
            f"{type(net).__name__}{'' if inputs is None else ' and ' + type(inputs).__name__}"
        )
    mounted = any(isinstance(m, Mechanism) for m in net.modules())
    changes = _build_changes(inputs)
    if mounted and not hides_future(net):
        changes = [change for change in changes if change.kind != "future"]
    return Subject(
        net.eval(), lambda x: _find_tensor(call_model(net, x)), changes, example_inputs=inputs, mounted=mounted
    )


def _build_changes(inputs: Inputs) -> list[Change]:
    """Change the first tensor of example inputs, [b, n] ids or [b, n, c] numbers or images.

    Raises:
        ValueError: There is none, or only one example.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    first = next((x for x in (list(named.values()) if named else _as_list(inputs)) if isinstance(x, Tensor)), None)
    if first is None or first.ndim < 2 or len(first) < 2:
        raise ValueError("example inputs must begin with a tensor of two examples or more, [b, n], [b, n, c] or images")
    changes = []
    hidden = _find_hidden(named, first)
    if hidden is not None:
        noise = None if not first.is_floating_point() else torch.randn_like(first) * NOISE
        after = inputs if noise is None else _replace(inputs, first, torch.where(hidden[..., None], noise, first))
        changes.append(Change("padding", inputs, after, ~hidden, ~hidden.all(1), hidden if noise is None else None))
    if first.ndim < 4:
        half = first.shape[1] // 2
        later = torch.cat([first[:, :half], _change_content(first[:, half:])], 1)
        early = torch.arange(first.shape[1]).expand(len(first), -1) < half
        changes.append(Change("future", inputs, _replace(inputs, first, later), early, None))
    after = _replace(inputs, first, torch.cat([_change_content(first[:1]), first[1:]]))
    others = torch.arange(len(first)) > 0
    tokens = others[:, None].expand(first.shape[:2]) if hidden is None else others[:, None] & ~hidden
    changes.append(Change("neighbours", inputs, after, tokens, others))
    return changes


def _find_hidden(named: Mapping[str, Any], first: Tensor) -> Tensor | None:
    masks = [named[name].bool() for name in HIDDEN_WHERE_TRUE if named.get(name) is not None]
    masks += [~named["attention_mask"].bool()] if named.get("attention_mask") is not None else []
    return next((mask for mask in masks if mask.shape == first.shape[:2] and mask.any()), None)


def _as_list(inputs: Inputs) -> list[Any]:
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _replace(inputs: Inputs, old: Tensor, new: Tensor) -> Inputs:
    """Replace one tensor of the inputs."""
    if isinstance(inputs, Mapping):
        return {key: new if value is old else value for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(new if value is old else value for value in inputs)
    return new


def _change_content(x: Tensor) -> Tensor:
    """Replace content: numbers by noise, ids by the same ids in reverse order."""
    return torch.randn_like(x) * NOISE if x.is_floating_point() else x.flip(1)


def _find_tensor(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


def _build_text_changes(inputs: Mapping[str, Tensor], read: str, written: str, visible: Tensor) -> list[Change]:
    """Build the changes of a model of text: padding of the second text, later tokens, and the first text."""
    ids = inputs[written]
    half = ids.shape[1] // 2
    tokens = visible if read == written else torch.ones_like(ids, dtype=torch.bool)
    whole = dict(inputs)
    if "attention_mask" in whole:
        whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    whole[read] = inputs[read][:1].roll(1, 1).repeat(2, 1)
    if read == written:
        ids = whole[read]
    later = whole | {written: torch.cat([ids[:, :half], ids[:, half:].flip(1)], 1)}
    first = dict(inputs) | {name: torch.cat([inputs[name][:1].flip(1), inputs[name][1:]]) for name in {read, written}}
    second = torch.tensor([False, True])
    return [
        Change("padding", inputs, inputs, tokens, torch.tensor([True, True]), ~visible),
        Change("future", whole, later, (torch.arange(ids.shape[1]) < half).expand_as(ids), None),
        Change("neighbours", inputs, first, tokens & second[:, None], second),
    ]


def _draw_texts(length: int, vocabulary: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """Draw ids of two texts, the second half as long and padded; return also which ids are not padding."""
    ids, visible = _draw_ids(length, vocabulary, padding), torch.ones(2, length, dtype=torch.bool)
    visible[1, length // 2 :] = False
    return ids.masked_fill(~visible, 0 if padding is None else padding), visible


def _draw_ids(length: int, vocabulary: int, padding: int | None) -> Tensor:
    """Draw ids of two texts without padding."""
    allowed = torch.tensor([i for i in range(vocabulary) if i != padding])
    return allowed[torch.randint(len(allowed), (2, length), generator=torch.Generator().manual_seed(0))]


def _draw_noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def spread_weights(net: Any) -> Any:
    """Give random weights a size at which attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return net
