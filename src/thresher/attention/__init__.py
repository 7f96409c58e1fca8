"""Attention mechanisms, one file each; see `base.py` for the contract they share."""

import difflib
import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module

from thresher.attention.base import (
    Attended,
    Call,
    Cost,
    KeyCodes,
    MakeMechanism,
    Mechanism,
    Metered,
    Pattern,
    ValueSource,
)

__all__ = [
    "Attended",
    "Call",
    "Cost",
    "KeyCodes",
    "MakeMechanism",
    "Mechanism",
    "Pattern",
    "ValueSource",
    "available",
    "find",
    "hyperparameters",
]


def available() -> list[str]:
    """List the names of the mechanisms: the files of this folder that define one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "__main__" and _mechanisms_of(m.name))


def find(name: str) -> type[Mechanism]:
    """Return the mechanism called `name`, that is the one defined in the file of that name.

    Raises:
        ValueError: There is none; the message lists what exists.
    """
    names = available()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no attention {name!r}{hint} Available: {', '.join(names)}")
    return _mechanisms_of(name)[0]


def _mechanisms_of(name: str) -> list[type[Mechanism]]:
    module = import_module(f"{__name__}.{name}")
    classes = (c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__)
    return [c for c in classes if issubclass(c, Mechanism) and not inspect.isabstract(c)]


def hyperparameters(mechanism: Callable[..., Metered]) -> dict[str, object]:
    """Return the hyper-parameters of a mechanism with their defaults."""
    parameters = inspect.signature(mechanism).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
