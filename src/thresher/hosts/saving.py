"""Adapters: the mechanisms of a model and their parameters as a folder of kilobytes, for the dense model to load.

An adapter belongs to one base model, by the names, shapes and values of its weights. What comes after the last
mechanism, such as a pooling or a classifier, does not count: the same encoder may have another head. Its folder holds

    thresher.json         recipe of each mechanism, and the fingerprint of the base model
    thresher.safetensors  parameters and buffers of the mechanisms, such as thresholds and tail factors
    README.md             a card that says what is in it and how to load it
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thresher.hosts.core import find_holders, find_host, take_out
from thresher.hosts.peft import find_running
from thresher.hosts.restoring import Recipes, list_recipes, restore_hosts

DESCRIPTION, PARAMETERS, CARD = "thresher.json", "thresher.safetensors", "README.md"
FORMAT = 1
OF_BASE = {"class", "name", "architecture", "weights"}
OF_MECHANISMS = re.compile(r"(^|\.)mechanism\.")
CARD_BEGIN = "---\nlibrary_name: thresher\n"


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the mechanisms of a model, without the weights of the model.

    Args:
        model: A model with mechanisms inside, as `sparsify` leaves it.
        folder: Created if missing; files of another adapter in it are replaced, a README.md of your own is not.

    Raises:
        ValueError: The model holds no mechanism, or one whose class this package does not know.
    """
    recipes = list_recipes(model)
    if not recipes:
        raise ValueError(f"{type(model).__name__} holds no mechanism to save; sparsify() gives it one")
    if unknown := [f"{name} ({r['attention']})" for name, r in recipes.items() if "hyperparameters" not in r]:
        raise ValueError(f"an adapter stores mechanisms of Thresher only, and cannot describe {', '.join(unknown)}")
    description = {"format": FORMAT, "base": describe_base(model, recipes), "mechanisms": recipes}
    state = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name in recipes
        for key, value in _get_mechanism(model, name).state_dict().items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / PARAMETERS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    card = folder / CARD
    if not card.exists() or card.read_text(encoding="utf-8").startswith(CARD_BEGIN):
        card.write_text(_write_card(model, description), encoding="utf-8")


def load_adapter(model: nn.Module, place: str | Path, *, same_weights: bool = True) -> list[str]:
    """Mount the mechanisms of an adapter into a dense model, with their parameters, in place.

    Args:
        model: The base model, without mechanisms.
        place: A folder that `save_adapter` wrote, or the name of a repository on the hub of Hugging Face.
        same_weights: Whether to refuse a model of the same architecture with other weights, such as a fine-tuned one.
            Weights in bf16 or fp32 count as the same.

    Returns:
        The names of the modules that hold mechanisms now.

    Raises:
        FileNotFoundError: There is no adapter at that place.
        ValueError: The adapter is damaged or of another version, belongs to another model, or leaves a parameter
            without a value; the model already holds mechanisms. The model is then unchanged.
    """
    folder = _find_folder(place)
    description, state = _read(folder)
    if held := find_holders(model):
        raise ValueError(f"{type(model).__name__} already holds mechanisms, in {held[0]} first: call densify() before")
    recipes: Recipes = description["mechanisms"]
    _check_base(model, recipes, description["base"], folder, same_weights)
    try:
        restore_hosts(model, recipes)
    except AttributeError as error:
        raise ValueError(f"{folder} has a mechanism for a module that the model lacks: {error}") from error
    names = list(recipes)
    try:
        _load_parameters(model, names, state, folder)
    except ValueError:
        take_out(model, names)
        raise
    return names


def push_adapter(folder: str | Path, repository: str, **options: Any) -> str:
    """Upload an adapter to the hub of Hugging Face; return its address.

    Args:
        folder: A folder that `save_adapter` wrote.
        repository: "owner/name"; created if missing.
        **options: Of `huggingface_hub.HfApi.upload_folder`, such as `token` or `revision`.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: It is damaged.
    """
    from huggingface_hub import HfApi

    _read(_find_folder(folder, hub=False))
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repository, exist_ok=True)
    files = [DESCRIPTION, PARAMETERS, CARD]
    return str(api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=files, **options))


def describe_base(model: nn.Module, mechanisms: Iterable[str]) -> dict[str, Any]:
    """Describe a model without its mechanisms: class, architecture and weights, the last two as fingerprints.

    Weights are rounded to bf16 first, so that a model loaded in bf16 is the one that was saved in fp32.

    Args:
        model: The model.
        mechanisms: Names of the modules that hold mechanisms; modules after them do not count.
    """
    after = tuple(_list_modules_after(model, mechanisms))
    state = {
        name: x for name, x in model.state_dict().items() if not (OF_MECHANISMS.search(name) or name.startswith(after))
    }
    shapes = sorted((name, list(x.shape)) for name, x in state.items())
    values = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        x = state[name].detach().cpu()
        rounded = x.to(torch.bfloat16).contiguous().view(torch.int16) if x.is_floating_point() else x.contiguous()
        values.update(name.encode() + rounded.numpy().tobytes())
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "name": str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        "architecture": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest(),
        "weights": values.hexdigest(),
    }


def _list_modules_after(model: nn.Module, mechanisms: Iterable[str]) -> Iterator[str]:
    """Yield the prefixes of the modules that are registered after the layers that hold mechanisms."""
    parent, prefix = model, ""
    for parts in zip(*(name.split(".") for name in mechanisms), strict=False):
        children = [name for name, _ in parent.named_children()]
        if len(set(parts)) > 1 or parts[0].isdecimal() or parts[0] not in children:
            return  # these are the layers, or the names are those of another model
        yield from (f"{prefix}{name}." for name in children[children.index(parts[0]) + 1 :])
        parent, prefix = parent.get_submodule(parts[0]), f"{prefix}{parts[0]}."


def _get_mechanism(model: nn.Module, name: str) -> nn.Module:
    host = find_host(model.get_submodule(name))
    assert host is not None
    mechanism: nn.Module = find_running(host.mechanism)
    return mechanism


def _find_folder(place: str | Path, hub: bool = True) -> Path:
    folder = Path(place)
    if (folder / DESCRIPTION).is_file():
        return folder
    if folder.exists() or not hub or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise FileNotFoundError(f"{place} holds no adapter: {DESCRIPTION}, which save_adapter writes, is not in it")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(place), allow_patterns=[DESCRIPTION, PARAMETERS]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no folder {place}, and no such repository on the hub: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version = description["format"]
        base, recipes = description.get("base"), description.get("mechanisms")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} has format {version}, and this version of Thresher reads {FORMAT}")
    complete = isinstance(base, dict) and base.keys() >= OF_BASE
    if not complete or not isinstance(recipes, dict) or not recipes:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: it lacks a base model or mechanisms")
    try:
        return description, load_file(folder / PARAMETERS)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / PARAMETERS} is missing or damaged: {error}") from error


def _check_base(
    model: nn.Module, recipes: Recipes, wanted: Mapping[str, str], folder: Path, same_weights: bool
) -> None:
    found = describe_base(model, recipes)
    named = wanted["name"] and f" ({wanted['name']})"
    if found["architecture"] != wanted["architecture"]:
        raise ValueError(
            f"{folder} belongs to a {wanted['class']}{named}, whose weights have other names or shapes than those of "
            f"this {found['class']}"
        )
    if same_weights and found["weights"] != wanted["weights"]:
        raise ValueError(
            f"{folder} belongs to a {wanted['class']}{named} with other weights than those of this model; "
            "load_adapter(..., same_weights=False) loads it all the same"
        )


def _load_parameters(model: nn.Module, names: list[str], state: Mapping[str, Tensor], folder: Path) -> None:
    own = {name: _get_mechanism(model, name) for name in names}
    wanted = {f"{name}.{key}": value for name in names for key, value in own[name].state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{folder} has no value for {', '.join(missing)}")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{folder} has values that no mechanism takes: {', '.join(unknown)}")
    if misshapen := [key for key, value in wanted.items() if value.shape != state[key].shape]:
        raise ValueError(f"{folder} has values of another shape for {', '.join(misshapen)}")
    for name, mechanism in own.items():
        mechanism.load_state_dict({key: state[f"{name}.{key}"] for key in mechanism.state_dict()})


def _write_card(model: nn.Module, description: Mapping[str, Any]) -> str:
    base, recipes = description["base"], description["mechanisms"]
    kinds = sorted({recipe["attention"] for recipe in recipes.values()})
    size = sum(x.numel() for name, x in model.state_dict().items() if OF_MECHANISMS.search(name))
    metadata = f"base_model: {base['name']}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"]) else ""
    lines = [
        f"{CARD_BEGIN}{metadata}tags:\n- sparse-attention\n---",
        f"# Sparse attention for {base['name'] or base['class']}",
        f"Mechanism: {', '.join(kinds)}, in {len(recipes)} modules; {size:,} numbers in `{PARAMETERS}`. The weights of "
        f"the model are not in this folder. It belongs to the layers of one model of the class `{base['class']}`; "
        "loading it into another one is refused.",
        "```python\nimport thresher\n\nthresher.load_adapter(model, FOLDER)  # model: the dense one\n```",
    ]
    return "\n\n".join(lines) + "\n"
