"""Save and load models of transformers with mechanisms: their configuration stores a recipe for each.

One model may hold mechanisms of several hosts: in transformers' own attention, in an `nn.MultiheadAttention`, in a
feed-forward layer. Loading restores all of them, or refuses the file and names those that it cannot restore.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig as Config
from transformers import PreTrainedModel

from thresher.attention.shared.thresholds import IN_SPREADS, Thresholds
from thresher.hosts.core import WATCHERS
from thresher.hosts.huggingface.switch import NAME
from thresher.hosts.restoring import Recipes, list_recipes, restore_hosts

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def find_roots(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Find the outermost models of transformers, with their names."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inner = any(not place or name.startswith(f"{place}.") for place, _ in found)
        if isinstance(module, PreTrainedModel) and not inner:
            found.append((name, module))
    return found


def write_recipes(model: nn.Module) -> None:
    """Write the recipes of all mechanisms into the configuration of each model of transformers."""
    for _, root in find_roots(model):
        if recipes := list_recipes(root):
            setattr(root.config, NAME, recipes)
        elif hasattr(root.config, NAME):
            delattr(root.config, NAME)


WATCHERS.append(write_recipes)


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model that was saved with mechanisms in it, and their parameters.

    The class's own `from_pretrained` loads the dense model. The state of mechanisms stays in fp32 if the model is
    loaded in a lower precision. The unit of thresholds is that of their state, whatever the recipe says.

    Args:
        path: A folder that `save_pretrained` wrote, or a name on the hub.
        **kwargs: For the `from_pretrained` of the class that the configuration names.

    Raises:
        ValueError: The model was saved without mechanisms, or one of them cannot be mounted again.
    """
    of_the_hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(
        path, trust_remote_code=False, **of_the_hub
    )
    recorded = list(_take_recipes(config))
    if not recorded:
        raise ValueError(f"{path} was saved without mechanisms; load it as a dense model, then call sparsify()")
    base = getattr(transformers, str((config.architectures or [""])[0]), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise ValueError(f"{path} names {config.architectures} as its architecture, not a model of transformers")

    def init(model: PreTrainedModel, config: Config, *args: Any, **settings: Any) -> None:
        base.__init__(model, config, *args, **settings)
        for of, recipes in recorded:
            restore_hosts(model, _complete_names(model, of, recipes))
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "mechanism"}

    sparse: Any = type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
    model, info = sparse.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    model.__class__ = base
    if missing := sorted(key for key in _read_units(model, info["missing_keys"]) if ".mechanism." in key):
        raise ValueError(f"{path} says that it holds mechanisms, and lacks their parameters: {', '.join(missing)}")
    if unknown := sorted(key for key in info["unexpected_keys"] if ".mechanism." in key):
        raise ValueError(f"{path} holds parameters of mechanisms that it does not describe: {', '.join(unknown)}")
    write_recipes(model)
    return model


def _read_units(model: nn.Module, missing: Iterable[str]) -> set[str]:
    """Read the units of thresholds that were loaded; return what is missing besides units that no old file has."""
    lacking = set(missing)
    for name, thresholds in model.named_modules():
        if not isinstance(thresholds, Thresholds):
            continue
        if f"{name}.{IN_SPREADS}" in lacking and f"{name}.base" not in lacking:
            lacking.remove(f"{name}.{IN_SPREADS}")
            thresholds.set_unit(thresholds.unit, thresholds.tau.item())
        thresholds.read_unit()
    return lacking


def _take_recipes(config: Config) -> Iterator[tuple[Config, Recipes]]:
    """Remove and yield the recipes of a configuration and those inside it, as parts may be sparsified alone."""
    if recipes := getattr(config, NAME, None):
        delattr(config, NAME)
        yield config, recipes
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, Config) and inner is not config:
            yield from _take_recipes(inner)


def _complete_names(model: PreTrainedModel, config: Config, recipes: Recipes) -> Recipes:
    """Complete the names of recipes to those in `model`, which may be another part than the sparsified one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = [
        name for name, m in modules.items() if isinstance(m, PreTrainedModel) and isinstance(m.config, type(config))
    ]
    full = {}
    for name, recipe in recipes.items():
        short = name.removeprefix(f"{model.base_model_prefix}.")
        known = (other for part in parts for other in ((f"{part}.{name}" if part else name), short) if other in modules)
        full[next(known, name)] = recipe
    if lacking := [name for name in full if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no {', '.join(lacking)}, where mechanisms were when it was saved")
    return full
