"""Swap the attention of a model for a mechanism, and back.

`mount` turns one attention module into one that runs a mechanism; each library adds an overload for its own
class, in a file of its own that is imported only when that library is (see `timm.py`).
"""

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial, singledispatch
from importlib import import_module
from typing import Any

from torch import nn

from thresher import attention as mechanisms
from thresher.attention.base import MakeMechanism, Metered
from thresher.attention.topk_ffn import TopKFeedForward

HOSTS = ("timm",)
FEED_FORWARD = {"topk_ffn": TopKFeedForward}
MakeFeedForward = Callable[[], TopKFeedForward]


class Host(nn.Module):
    """An attention or feed-forward module that runs a mechanism in place of its own arithmetic.

    It adopts the children of the module that it replaces under their own names, so that state-dict keys stay as
    they were and a dense checkpoint loads.

    Args:
        original: The module replaced; `restore` gives it back.
        mechanism: What runs inside.
        dropout: Dropout of attention weights, or of hidden units, in the original.
    """

    mechanism: Metered

    def __init__(self, original: nn.Module, mechanism: Metered, dropout: float = 0.0) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        mechanism.dropout = dropout
        self.mechanism = mechanism
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module that was replaced, with the children that it had then."""
        return self._original[0]

    def restore(self) -> nn.Module:
        """Return the module that was replaced, with the children as they are now."""
        original = self.original
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
    return _mount_late(mount, module, make)


@singledispatch
def mount_feed_forward(module: nn.Module, make: MakeFeedForward) -> Host:
    """Return a module that computes what `module` does, with the feed-forward layer that `make` builds.

    Raises:
        TypeError: No overload knows this kind of module.
    """
    return _mount_late(mount_feed_forward, module, make)


def _mount_late(kind: Any, module: nn.Module, make: Any) -> Host:
    """Look again once the hosts of all imported libraries are there."""
    _load_hosts()
    if _knows(kind, type(module)):
        host: Host = kind(module, make)
        return host
    raise TypeError(f"no host knows {_qualified_name(type(module))}; mountable: {', '.join(_mountable(kind))}")


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
    return _inject(mount, model, make, where)


def _inject(kind: Any, model: nn.Module, make: Any, where: str | None) -> list[str]:
    _load_hosts()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = [name for name, m in modules.items() if isinstance(m, Host) and _knows(kind, type(m.original))]
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    known = [name for name, module in modules.items() if _knows(kind, type(module))]
    names = [name for name in known if where is None or re.search(where, name)]
    if not names:
        raise ValueError(_nothing_matched(kind, model, where, known + taken))
    hosts = {module: kind(module, make) for module in dict.fromkeys(modules[name] for name in names)}
    for name in names:
        _replace(model, name, hosts[modules[name]])
    return names


def sparsify(
    model: nn.Module, attention: str = "latte", *, where: str | None = None, **hyperparameters: Any
) -> list[str]:
    """Give `model` another attention, or with "topk_ffn" other feed-forward layers, in place.

    Args:
        model: A model whose attention a host knows, for example any timm vision transformer.
        attention: Name of the mechanism; `thresher.attention.available()` lists those of attention.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        **hyperparameters: Of the mechanism, see its class.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: Unknown mechanism, unknown hyper-parameter, or nothing to replace.
    """
    cls = FEED_FORWARD.get(attention) or mechanisms.find(attention)
    allowed = mechanisms.hyperparameters(cls)
    if unknown := [name for name in hyperparameters if name not in allowed]:
        options = ", ".join(f"{name}={default!r}" for name, default in allowed.items()) or "none"
        raise ValueError(f"{attention} has no hyper-parameter {', '.join(map(repr, unknown))}; it has: {options}")
    kind = mount_feed_forward if attention in FEED_FORWARD else mount
    return _inject(kind, model, partial(cls, **hyperparameters), where)


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


def _knows(kind: Any, cls: type) -> bool:
    return kind.dispatch(cls) is not kind.dispatch(object)


def _load_hosts() -> None:
    """Register the overloads of every library that has been imported: a module of another cannot exist."""
    for library in HOSTS:
        if library in sys.modules:
            import_module(f"thresher.hosts.{library}")
    if "transformers" in sys.modules:
        import_module("thresher.hosts.huggingface_ffn").register_loaded()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not child:
        raise ValueError("the model is itself an attention module; call mount() on it")
    setattr(model.get_submodule(parent), child, module)


def _mountable(kind: Any) -> list[str]:
    _load_hosts()
    return [_qualified_name(cls) for cls in kind.registry if cls is not object]


def _nothing_matched(kind: Any, model: nn.Module, where: str | None, known: list[str]) -> str:
    what, words = ("attention", ("attention",)) if kind is mount else ("feed-forward", ("mlp", "feedforward"))
    if known:
        return f"no {what} module matches {where!r}; there are: {', '.join(known)}"
    kinds = sorted({_qualified_name(type(m)) for m in model.modules() if _named_like(m, words)})
    seen = f"It has {', '.join(kinds)}. " if kinds else ""
    names = ", ".join(_mountable(kind))
    return f"{type(model).__name__} has no {what} module that a host knows. {seen}Known: {names}"


def _named_like(module: nn.Module, words: Sequence[str]) -> bool:
    return any(word in type(module).__name__.lower() for word in words)


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
