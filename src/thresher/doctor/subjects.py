"""A model by its name, with inputs that show whether its masks hold.

A run, checkpoint or export is believed as little as anywhere (see `trust.py`). A function that the user names on the
command line is imported and called, like any module that the user names to Python.
"""

import difflib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import timm
import torch
from torch import Tensor, nn

from thresher.attention import Mechanism
from thresher.doctor.leaks import NOISE, Change, Inputs, Subject, hides_future
from thresher.exported import DESCRIPTION, is_export
from thresher.hosts.recording import run
from thresher.loading import load_model
from thresher.models.transformer import Classifier, EncoderDecoder, LanguageModel, Stack

HIDDEN_WHERE_TRUE = ("src_key_padding_mask", "key_padding_mask", "memory_key_padding_mask")
HUGGING_FACE = {"encoder": "input_ids", "decoder": "decoder_input_ids"}


def subject_of(name: str, tokens: int, conf: Path) -> Subject:
    """Return the model that a name stands for.

    Args:
        name: A run, checkpoint or export; `timm:NAME` or `hf:NAME`, where the prefix may be left out; or
            `package.module:function`, which returns a model, or a model and example inputs.
        tokens: Length of the texts that it gets, or as many as it takes.
        conf: Folder of configs, which say what a checkpoint may name.

    Raises:
        ValueError: There is no such model, or nothing is known of its inputs.
        FileNotFoundError: There is no such file, or no such model of transformers.
    """
    kind, colon, rest = name.partition(":")
    path = Path(name)
    if kind == "timm" and colon:
        return of_timm(rest)
    if kind == "hf" and colon:
        return of_transformers(rest, tokens)
    if path.exists() and not _is_saved_by_transformers(path):
        return of_checkpoint(path, tokens, conf)
    if path.exists():
        return of_transformers(name, tokens)
    if kind == "package":
        return of_transformers(name, tokens)
    if colon:
        return of_function(name)
    if timm.is_model(name):
        return of_timm(name)
    if "/" not in name and path.suffix not in (".ckpt", ".pt"):
        close = difflib.get_close_matches(name, timm.list_models(), n=2)
        try:
            return of_transformers(name, tokens)
        except FileNotFoundError as error:
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"timm has no model {name!r}{hint} And {error}") from error
    return of_transformers(name, tokens)


def _is_saved_by_transformers(path: Path) -> bool:
    if not (path / DESCRIPTION).is_file():
        return False
    try:
        told = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / DESCRIPTION} cannot be read: {error}") from error
    return isinstance(told, Mapping) and "model_type" in told and not (is_export(path) and "classes" in told)


def of_timm(name: str) -> Subject:
    """Build a model of timm's with random weights.

    Raises:
        ValueError: There is none of this name.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}{hint}")
    net = timm.create_model(name, pretrained=False)
    size = timm.data.resolve_model_data_config(net)["input_size"]
    return of_images(spread(net), size)


def of_images(net: nn.Module, size: tuple[int, ...], mounted: bool = False) -> Subject:
    """Let a model see images; where it takes a mask of tokens, the lowest quarter of the patches is hidden.

    Args:
        net: The model.
        size: Channels, height and width.
        mounted: Whether it holds mechanisms already.
    """
    net = net.eval()
    images = _noise(2, *size)
    other = torch.cat([_noise(1, *size, seed=2), images[1:]])
    changes = [Change("neighbours", images, other, None, torch.tensor([False, True]))]
    features = getattr(net, "forward_features", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if features is None or grid is None or "attn_mask" not in inspect.signature(features).parameters:
        return Subject(net, lambda x: run(net, x), changes, example_inputs=images, mounted=mounted)
    with torch.no_grad():
        count = features(images[:1]).shape[1]
    hidden = max(grid[0] // 4, 1) * grid[1]
    visible = torch.arange(count) < count - hidden
    padded = images.clone()
    padded[:, :, -(max(grid[0] // 4, 1) * size[1] // grid[0]) :] = NOISE * _noise(1, seed=3)
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


def of_transformers(name: str, tokens: int) -> Subject:
    """Build a model of transformers from its configuration, with random weights.

    Raises:
        ValueError: It takes neither texts nor images.
        FileNotFoundError: There is none of this name.
    """
    try:
        from thresher.models.huggingface import bare_model
    except ImportError as error:
        raise ValueError(f"{name!r} may be a model of transformers: pip install 'thresher[hf]'") from error
    net = spread(bare_model(name)).eval()
    config = net.config
    if net.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = vision.image_size if isinstance(vision.image_size, tuple | list) else (vision.image_size,) * 2
        size = (2, vision.num_channels, *side)
        images, other = {"pixel_values": _noise(*size)}, {"pixel_values": _noise(*size)}
        other["pixel_values"][0] = _noise(*size[1:], seed=2)
        change = Change("neighbours", images, other, None, torch.tensor([False, True]))
        return Subject(net, lambda x: net(**x)[0], [change])
    if net.main_input_name != "input_ids":
        raise ValueError(
            f"{type(net).__name__} takes {net.main_input_name}: name a function package.module:function that returns "
            "it with example inputs"
        )
    text = config.get_text_config()
    length = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
    ids, visible = _texts(length, text.vocab_size, config.pad_token_id)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": visible.long()}
    written = "input_ids"
    if config.is_encoder_decoder:
        written = "decoder_input_ids"
        inputs[written] = _ids(length // 2, config.get_text_config(decoder=True).vocab_size, config.pad_token_id)
    cached = {"use_cache": False} if hasattr(text, "use_cache") else {}
    return Subject(net, lambda x: net(**x, **cached)[0], _text_changes(inputs, "input_ids", written, visible))


def of_checkpoint(path: Path, tokens: int, conf: Path) -> Subject:
    """Load a trained network, whose attention stays as it was trained.

    Raises:
        ValueError: It is damaged, names what is not ours, or takes neither tokens nor images.
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
        return of_images(net, _size_of(net), mounted=True)
    length = min(tokens, length)
    ids, visible = _texts(length, vocabulary, padding)
    two = isinstance(net, EncoderDecoder) or bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    inputs = {"tokens": ids} | ({"target": _ids(length // 2, vocabulary, padding)} if two else {})
    written = "target" if two else "tokens"
    if isinstance(net, EncoderDecoder):
        changes = _text_changes(inputs, "tokens", written, visible)
        return Subject(net, lambda x: net(x["tokens"], x["target"]), changes, mounted=True)
    causal = isinstance(net, LanguageModel) or not isinstance(net, Classifier)
    changes = _text_changes(inputs, "tokens", written, visible)
    if not (causal and hides_future(net)):
        changes = [change for change in changes if change.what != "future"]
    return Subject(net, lambda x: net(*x.values()), changes, mounted=True)


def _size_of(net: nn.Module) -> tuple[int, ...]:
    """Return channels, height and width that a model of timm's was built for.

    Raises:
        ValueError: It does not say.
    """
    embed = getattr(net, "patch_embed", None)
    side, first = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    if side is None or not isinstance(first, nn.Conv2d):
        raise ValueError(
            f"{type(net).__name__} does not say what images it takes: name a function package.module:function that "
            "returns it with example inputs"
        )
    return (first.in_channels, *side)


def of_function(name: str) -> Subject:
    """Call a function of the user's that returns a model and example inputs, two examples or more.

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
    changes = _own_changes(inputs)
    if mounted and not hides_future(net):
        changes = [change for change in changes if change.what != "future"]
    return Subject(net.eval(), lambda x: _first(run(net, x)), changes, example_inputs=inputs, mounted=mounted)


def _own_changes(inputs: Inputs) -> list[Change]:
    """Change the first tensor of example inputs, [b, n] ids or [b, n, c] numbers or images.

    Raises:
        ValueError: There is none, or only one example.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    first = next((x for x in (list(named.values()) if named else _listed(inputs)) if isinstance(x, Tensor)), None)
    if first is None or first.ndim < 2 or len(first) < 2:
        raise ValueError("example inputs must begin with a tensor of two examples or more, [b, n], [b, n, c] or images")
    changes = []
    hidden = _hidden(named, first)
    if hidden is not None:
        noise = None if not first.is_floating_point() else torch.randn_like(first) * NOISE
        after = inputs if noise is None else _put(inputs, first, torch.where(hidden[..., None], noise, first))
        changes.append(Change("padding", inputs, after, ~hidden, ~hidden.all(1), hidden if noise is None else None))
    if first.ndim < 4:
        half = first.shape[1] // 2
        later = torch.cat([first[:, :half], _other(first[:, half:])], 1)
        early = torch.arange(first.shape[1]).expand(len(first), -1) < half
        changes.append(Change("future", inputs, _put(inputs, first, later), early, None))
    after = _put(inputs, first, torch.cat([_other(first[:1]), first[1:]]))
    others = torch.arange(len(first)) > 0
    tokens = others[:, None].expand(first.shape[:2]) if hidden is None else others[:, None] & ~hidden
    changes.append(Change("neighbours", inputs, after, tokens, others))
    return changes


def _hidden(named: Mapping[str, Any], first: Tensor) -> Tensor | None:
    masks = [named[name].bool() for name in HIDDEN_WHERE_TRUE if named.get(name) is not None]
    masks += [~named["attention_mask"].bool()] if named.get("attention_mask") is not None else []
    return next((mask for mask in masks if mask.shape == first.shape[:2] and mask.any()), None)


def _listed(inputs: Inputs) -> list[Any]:
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _put(inputs: Inputs, old: Tensor, new: Tensor) -> Inputs:
    """Return inputs with one tensor in place of another."""
    if isinstance(inputs, Mapping):
        return {key: new if value is old else value for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(new if value is old else value for value in inputs)
    return new


def _other(x: Tensor) -> Tensor:
    """Return other content: noise, or other ids among those that are there, last token first."""
    return torch.randn_like(x) * NOISE if x.is_floating_point() else x.flip(1)


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


def _text_changes(inputs: Mapping[str, Tensor], read: str, written: str, visible: Tensor) -> list[Change]:
    """Hide the end of the second text; change what is later in, and the first text of, what is written."""
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


def _texts(length: int, vocabulary: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """Return ids of two texts, the second half as long and padded, and which of them are no padding."""
    ids, visible = _ids(length, vocabulary, padding), torch.ones(2, length, dtype=torch.bool)
    visible[1, length // 2 :] = False
    return ids.masked_fill(~visible, 0 if padding is None else padding), visible


def _ids(length: int, vocabulary: int, padding: int | None) -> Tensor:
    """Draw ids of two texts; none is padding."""
    allowed = torch.tensor([i for i in range(vocabulary) if i != padding])
    return allowed[torch.randint(len(allowed), (2, length), generator=torch.Generator().manual_seed(0))]


def _noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def spread(net: Any) -> Any:
    """Give random weights a size at which attention is anything but uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return net
