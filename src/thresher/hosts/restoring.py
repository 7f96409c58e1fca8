"""The recipes of the mechanisms of a model, as files store them, and mechanisms mounted again from these."""

from typing import Any

from torch import nn

from thresher.hosts.core import (
    RESTORERS,
    Guest,
    Host,
    find_holders,
    find_host,
    load_hosts,
    notify_watchers,
    place,
)
from thresher.hosts.peft import find_running
from thresher.hosts.recipes import build_unknown_recipe, update_recipe

Recipes = dict[str, dict[str, Any]]


def list_recipes(model: nn.Module) -> Recipes:
    """List the recipes of the mechanisms of a model, by the dotted name of their module."""
    hosts = {name: find_host(model.get_submodule(name)) for name in find_holders(model)}
    held = {name: (host, find_running(host.mechanism)) for name, host in hosts.items() if host is not None}
    return {
        name: update_recipe(host.recipe or build_unknown_recipe(host.kind, mechanism), mechanism)
        for name, (host, mechanism) in held.items()
    }


def restore_hosts(model: nn.Module, recipes: Recipes) -> None:
    """Mount the mechanism of each recipe into the module that it names, in place; all of them or none.

    Args:
        model: A model without mechanisms there.
        recipes: By the dotted name of the module.

    Raises:
        ValueError: Some mechanisms cannot be mounted; the message names them.
        AttributeError: The model has no such module.
    """
    load_hosts()
    modules = {name: model.get_submodule(name) for name in recipes}
    built: dict[int, Host | Guest] = {}
    refused = []
    for name, recipe in recipes.items():
        module, kind = modules[name], recipe.get("host")
        try:
            if kind not in RESTORERS:
                raise ValueError(f"there is no host {kind!r}")
            host = built.get(id(module)) or RESTORERS[kind](model, name, module, recipe)
        except (KeyError, TypeError, ValueError) as error:
            refused.append(f"{name} ({error})")
            continue
        host.recipe = recipe
        built[id(module)] = host
    if refused:
        for host in built.values():
            host.restore()
        raise ValueError(
            "these mechanisms cannot be mounted again; load the dense model (in transformers, with its class's own "
            f"from_pretrained), then inject() them: {', '.join(refused)}"
        )
    for name, module in modules.items():
        place(model, name, built[id(module)])
    notify_watchers(model)
