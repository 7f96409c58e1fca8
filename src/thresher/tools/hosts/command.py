"""The command: put an adapter or a mechanism into a model, and list what stands where."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from thresher.attention import available, find, hyperparameters
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import flatten_options
from thresher.attention.registry import name_of
from thresher.attention.shared.offsets import HeadOffsets, named_offsets
from thresher.config.commands import compose_options
from thresher.hosts import densify, sparsify
from thresher.hosts.core import find_holders, find_host
from thresher.hosts.recipes import FEED_FORWARD
from thresher.hosts.restoring import list_recipes
from thresher.hosts.saving import DESCRIPTION, load_adapter
from thresher.tools.hosts.networks import Network, load_network

HEAD = ("module", "host", "attention", "mechanism", "heads")
SHOWN = 4  # heads whose values are listed one by one


def show_hosts(conf: Path, arguments: Sequence[str]) -> str:
    """Describe what stands in a model, or would, as a sentence and a table in Markdown.

    Raises:
        ValueError: An option is wrong, there is no such model, or the adapter does not belong to it.
        FileNotFoundError: There is no such file.
    """
    cfg = compose_options(conf, "hosts", arguments, input_key="network")
    if cfg.network is None:
        raise ValueError("which model? python -m thresher.hosts network=MODEL [adapter=FOLDER]")
    if cfg.adapter is not None and (cfg.mechanism is not None or cfg.where is not None):
        raise ValueError("adapter=FOLDER brings its own mechanisms: leave out mechanism and where")
    if cfg.adapter is not None and not (Path(cfg.adapter) / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{cfg.adapter} is no folder of an adapter: {DESCRIPTION} is not in it")
    network = load_network(str(cfg.network), conf)
    what = _replace(network, cfg)
    rows = [HEAD, ("---",) * len(HEAD), *_list_rows(network.model)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = f"{cfg.network} is a {type(network.model).__name__}{network.note}. {what}\n\n{table}"
    if cfg.run.dir is not None:
        path = Path(cfg.run.dir) / "hosts.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return text


def _replace(network: Network, cfg: DictConfig) -> str:
    """Put into a model what the options name; say what the table shows."""
    model, held = network.model, find_holders(network.model)
    if cfg.adapter is None and cfg.mechanism is None and (held or _find_built_in(model)):
        return "It holds:"
    if held:
        densify(model)
    if cfg.adapter is not None:
        load_adapter(model, cfg.adapter, same_weights=network.trained)
        if network.trained:
            return f"{cfg.adapter} belongs to it, by the names, shapes and values of its weights. It brings:"
        return (
            f"{cfg.adapter} fits the names and shapes of its weights; whether it fits their values is unknown. "
            "It brings:"
        )
    mechanism = cfg.mechanism or "latte"
    sparsify(model, mechanism, where=cfg.where, example_inputs=network.example_inputs)
    return f"{mechanism} would stand in:"


def _find_built_in(model: nn.Module) -> dict[str, Mechanism]:
    """Find the mechanisms that a network of this project builds in."""
    hosted = [f"{name}.mechanism" for name in find_holders(model)]
    return {name: m for name, m in model.named_modules() if isinstance(m, Mechanism) and name not in hosted}


def _list_rows(model: nn.Module) -> Iterator[tuple[str, ...]]:
    for name, recipe in list_recipes(model).items():
        host = find_host(model.get_submodule(name))
        assert host is not None
        pattern = str(recipe.get("pattern", host.part)).lower().replace("_", " ")
        yield name, type(host).__name__, pattern, _describe_mechanism(recipe), _describe_heads(host.mechanism)
    for name, mechanism in _find_built_in(model).items():
        pattern = mechanism.pattern.name.lower().replace("_", " ")
        yield name, "built in", pattern, f"`{name_of(type(mechanism))}`", _describe_heads(mechanism)


def _describe_mechanism(recipe: Mapping[str, Any]) -> str:
    """Describe a mechanism by its name and the settings that are not its defaults."""
    name = recipe["attention"]
    if name not in available() and name not in FEED_FORWARD:
        return f"`{name}`"
    default = flatten_options(hyperparameters(FEED_FORWARD.get(name) or find(name)))
    given = flatten_options(recipe.get("hyperparameters", {}))
    settings = [f"{key}={value}" for key, value in given.items() if default.get(key, ...) != value]
    return " ".join([f"`{name}`", *settings])


def _describe_heads(mechanism: Any) -> str:
    return "; ".join(_describe_offsets(each) for _, each in named_offsets(mechanism))


def _describe_offsets(offsets: HeadOffsets) -> str:
    values = offsets.values().detach().tolist()
    kind = "factors" if offsets.unit == "log" else f"thresholds in {offsets.unit}"
    if len({*values}) > 1 and len(values) <= SHOWN:
        return f"{kind}: {', '.join(f'{value:.3g}' for value in values)}"
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{len(values)} {kind}: {least}" + (f" to {most}" if most != least else "")
