"""The list of mechanisms: each file or subfolder of this folder that defines one."""

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path

from thresher.attention.mechanism import Mechanism, Metered

FOLDER = Path(__file__).parent
PACKAGE = __name__.rpartition(".")[0]
NO_MECHANISM = {"__main__", "registry"}


def available() -> list[str]:
    """List the names of all mechanisms."""
    names = (m.name for m in pkgutil.iter_modules([str(FOLDER)]))
    return sorted(name for name in names if name not in NO_MECHANISM and _find_mechanisms(name))


def find(name: str) -> type[Mechanism]:
    """Find a mechanism by the name of its file or subfolder.

    Raises:
        ValueError: There is none of that name; the message lists all names.
    """
    names = available()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no attention {name!r}{hint} Available: {', '.join(names)}")
    return _find_mechanisms(name)[0]


def name_of(mechanism: type) -> str:
    """Return the name of a mechanism: that of its file or subfolder, inside or outside of this package."""
    module = mechanism.__module__
    if module.startswith(f"{PACKAGE}."):
        return module.removeprefix(f"{PACKAGE}.").partition(".")[0]
    return module.rpartition(".")[2]


def _find_mechanisms(name: str) -> list[type[Mechanism]]:
    module = import_module(f"{PACKAGE}.{name}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if name_of(c) == name]
    return [c for c in classes if issubclass(c, Mechanism) and not inspect.isabstract(c)]


def hyperparameters(mechanism: Callable[..., Metered]) -> dict[str, object]:
    """List the hyper-parameters of a mechanism with their defaults; groups of options become mappings."""
    parameters = [p for p in inspect.signature(mechanism).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: _to_plain(p.default) for p in parameters}


def complete_hyperparameters(mechanism: Callable[..., Metered], given: Mapping[str, object]) -> dict[str, object]:
    """Complete hyper-parameters with defaults, inside groups too."""
    defaults = hyperparameters(mechanism)
    complete = defaults | {name: _to_plain(value) for name, value in given.items()}
    for name, default in defaults.items():
        value = complete[name]
        if isinstance(default, dict) and isinstance(value, Mapping):
            complete[name] = default | dict(value)
    return complete


def _to_plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
