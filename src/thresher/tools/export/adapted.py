"""A dense checkpoint with an adapter, as the checkpoint of a sparse network that an export can describe."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from thresher.checkpoints.format import ARGUMENTS, CONFIG, NAME, NETWORK, RECORD, STATE
from thresher.checkpoints.rebuild import rebuild_network
from thresher.hosts.core import find_holders
from thresher.hosts.restoring import list_recipes
from thresher.hosts.wrapped import exchange_for_adapter, get_model

WHERE = "where"  # argument of a model: which modules hold a mechanism


def rebuild_with_adapter(
    checkpoint: Mapping[str, Any], adapter: str, conf: Path, source: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the network of a checkpoint with the mechanisms of an adapter, from a config that says so.

    Args:
        checkpoint: Has the weights; its own mechanisms are left out.
        adapter: See `load_adapter`.
        conf: Folder of configs.
        source: Of the checkpoint, for messages.

    Returns:
        The network, as its new checkpoint is rebuilt, and that checkpoint.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It belongs to another network, or one config cannot describe all of its mechanisms.
    """
    net = rebuild_network(checkpoint, conf, source)
    before = find_holders(net)
    exchange_for_adapter(net, adapter)
    wanted = _list_plain_recipes(net)
    config = _describe(checkpoint[RECORD][CONFIG], wanted, before, find_holders(net))
    state = {f"{NETWORK}{name}": value for name, value in net.state_dict().items()}
    sparse = {STATE: state, RECORD: {**checkpoint[RECORD], CONFIG: config}}
    try:
        rebuilt = rebuild_network(sparse, conf, f"{source} with {adapter}")
        found = _list_plain_recipes(rebuilt)
    except ValueError as error:
        raise _build_error(adapter, str(error)) from error
    if differing := [name for name in wanted | found if found.get(name) != wanted.get(name)]:
        raise _build_error(adapter, f"the mechanism of {differing[0]} differs from that of {next(iter(wanted))}")
    return rebuilt, sparse


def _list_plain_recipes(net: nn.Module) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(list_recipes(get_model(net))))
    return plain


def _describe(
    config: Mapping[str, Any], recipes: Mapping[str, Any], before: Sequence[str], now: Sequence[str]
) -> dict[str, Any]:
    """Describe the config of a network with one mechanism, in some modules or all."""
    recipe = next(iter(recipes.values()))
    model = config["model"]
    if set(now) != set(before):
        where = f"^(?:{'|'.join(map(re.escape, now))})$"
        model = {**model, ARGUMENTS: {**model[ARGUMENTS], WHERE: where}}
    attention = {NAME: recipe["attention"], ARGUMENTS: recipe["hyperparameters"]}
    return {**config, "attention": attention, "model": model}


def _build_error(adapter: str, reason: str) -> ValueError:
    return ValueError(
        f"{adapter} cannot be exported, since an export has one mechanism with the same settings in all modules "
        f"({reason}); thresher.load_adapter and eval.py load it"
    )
