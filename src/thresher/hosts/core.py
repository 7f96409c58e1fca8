"""Swap the attention of a model for a mechanism, and back.

`mount` turns one attention module into one that runs a mechanism; each library adds an overload for its own
class, in a file of its own that is imported only when that library is (see `timm.py`).
"""

import re
import sys
from functools import partial, singledispatch
from importlib import import_module
from typing import Any

from torch import nn

from thresher import attention as mechanisms
from thresher.attention.base import MakeMechanism, Mechanism

HOSTS = ("timm",)


class Host(nn.Module):
    """An attention module that runs a mechanism in place of its own arithmetic.

    It adopts the children of the module that it replaces under their own names, so that state-dict keys stay as
    they were and a dense checkpoint loads.

    Args:
        original: The module replaced; `restore` gives it back.
        mechanism: What runs inside.
        dropout: Dropout of attention weights in the original.
    """

    mechanism: Mechanism

    def __init__(self, original: nn.Module, mechanism: Mechanism, dropout: float = 0.0) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        mechanism.dropout = dropout
        self.mechanism = mechanism
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        self.train(original.training)

    def restore(self) -> nn.Module:
        """Return the module that was replaced, with the children as they are now."""
        (original,) = self._original
        for name, child in self.named_children():
            if name != "mechanism":
                setattr(original, name, child)
        return original.train(self.training)


@singledispatch
def mount(module: nn.Module, make: MakeMechanism) -> Host:
    """Return a module that computes what `module` does, with attention by the mechanism that `make` builds.

    Raises:
        TypeError: No overload knows this kind of module.
    """
    _load_hosts()
    if mount.dispatch(type(module)) is not _UNKNOWN:
        return mount(module, make)
    raise TypeError(f"no host knows {_qualified_name(type(module))}; mountable: {', '.join(_mountable())}")


def inject(model: nn.Module, make: MakeMechanism, *, where: str | None = None) -> list[str]:
    """Mount a mechanism into every attention module of `model` that a host knows, in place.

    Args:
        model: Any model.
        make: Builds one mechanism for each attention module.
        where: Regular expression that a module's dotted name must contain; all of them by default.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: Nothing matched, or the model already holds a mechanism there.
    """
    _load_hosts()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = [name for name, module in modules.items() if isinstance(module, Host)]
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    known = [name for name, module in modules.items() if mount.dispatch(type(module)) is not _UNKNOWN]
    names = [name for name in known if where is None or re.search(where, name)]
    if not names:
        raise ValueError(_nothing_matched(model, where, known + taken))
    hosts = {module: mount(module, make) for module in dict.fromkeys(modules[name] for name in names)}
    for name in names:
        _replace(model, name, hosts[modules[name]])
    return names


def sparsify(
    model: nn.Module, attention: str = "latte", *, where: str | None = None, **hyperparameters: Any
) -> list[str]:
    """Give `model` another attention, in place.

    Args:
        model: A model whose attention a host knows, for example any timm vision transformer.
        attention: Name of the mechanism; `thresher.attention.available()` lists them.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        **hyperparameters: Of the mechanism, see its class.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: Unknown mechanism, unknown hyper-parameter, or nothing to replace.
    """
    cls = mechanisms.find(attention)
    allowed = mechanisms.hyperparameters(cls)
    if unknown := [name for name in hyperparameters if name not in allowed]:
        options = ", ".join(f"{name}={default!r}" for name, default in allowed.items()) or "none"
        raise ValueError(f"{attention} has no hyper-parameter {', '.join(map(repr, unknown))}; it has: {options}")
    return inject(model, partial(cls, **hyperparameters), where=where)


def densify(model: nn.Module) -> list[str]:
    """Take every mechanism out again, in place; outputs and state dict are those of the original model.

    Returns:
        The names of the modules that were restored.

    Raises:
        ValueError: The model holds no mechanism.
    """
    hosts = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Host)}
    if not hosts:
        raise ValueError(f"{type(model).__name__} holds no mechanism: there is nothing to take out")
    for name, host in hosts.items():
        _replace(model, name, host.restore())
    return list(hosts)


_UNKNOWN = mount.dispatch(object)


def _load_hosts() -> None:
    """Register the overloads of every library that has been imported: a module of another cannot exist."""
    for library in HOSTS:
        if library in sys.modules:
            import_module(f"thresher.hosts.{library}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not child:
        raise ValueError("the model is itself an attention module; call mount() on it")
    setattr(model.get_submodule(parent), child, module)


def _mountable() -> list[str]:
    _load_hosts()
    return [_qualified_name(cls) for cls in mount.registry if cls is not object]


def _nothing_matched(model: nn.Module, where: str | None, known: list[str]) -> str:
    if known:
        return f"no attention module matches {where!r}; there are: {', '.join(known)}"
    kinds = sorted({_qualified_name(type(m)) for m in model.modules() if "attention" in type(m).__name__.lower()})
    seen = f"It has {', '.join(kinds)}. " if kinds else ""
    return f"{type(model).__name__} has no attention module that a host knows. {seen}Known: {', '.join(_mountable())}"


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
