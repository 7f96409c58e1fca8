"""Swap the attention of a model for a mechanism, and back.

`mount` turns one attention module into one that runs a mechanism; each library adds an overload for its own
class, in a file of its own that is imported only when that library is (see `timm.py`). Where the class of a module
does not tell that it attends, a finder looks at the whole model (see `sdpa.py`, `huggingface.py`).
"""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from thresher.attention.base import MakeMechanism, Mechanism, Metered

# The file of each host, in the order in which they are asked, and the library whose modules it knows.
HOSTS = {"timm": "timm", "huggingface": "transformers", "multihead": "torch", "sdpa": "torch"}
_log = logging.getLogger(__name__)


class Host(nn.Module):
    """An attention or feed-forward module that runs a mechanism in place of its own arithmetic.

    It adopts the children of the module that it replaces under their own names, so that state-dict keys stay as
    they were and a dense checkpoint loads.

    Args:
        original: The module replaced; `restore` gives it back.
        mechanism: What runs inside.
        dropout: Dropout of attention weights, or of hidden units, in the original.

    Attributes:
        part: Which part of a block it is: "attention" or "feed-forward".
    """

    part: ClassVar[str] = "attention"
    mechanism: Metered

    def __init__(self, original: nn.Module, mechanism: Metered, dropout: float = 0.0) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        mechanism.dropout = dropout
        self.mechanism = mechanism.to(device_of(original))
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        self.train(original.training)

    def enter(self) -> None:
        """Arrange what is around the module, as soon as it is in its place."""

    def restore(self) -> nn.Module:
        """Return the module that was replaced, with the children as they are now."""
        (original,) = self._original
        for name, child in self.named_children():
            if name != "mechanism":
                setattr(original, name, child)
        return original.train(self.training)


class Guest:
    """A mechanism that moves into an attention module, which stays where and what it is.

    Args:
        module: The attention module.
        mechanism: What moves in, as its child `mechanism`.
    """

    part: ClassVar[str] = "attention"

    def __init__(self, module: nn.Module, mechanism: Mechanism) -> None:
        self.module = module
        self.mechanism = mechanism.to(device_of(module)).train(module.training)

    def enter(self) -> None:
        """Move in."""
        self.module.mechanism = self.mechanism
        self.module._guest = self  # type: ignore[assignment]

    def restore(self) -> nn.Module:
        """Move out, and return the module as it was."""
        if self.module.__dict__.pop("_guest", None) is self:
            del self.module.mechanism
        return self.module


class Build(Protocol):
    """Builds what `make` makes for one attention module, without touching the model yet."""

    def __call__(self, make: MakeMechanism) -> Host | Guest: ...


@dataclass(frozen=True)
class Found:
    """Attention modules that a finder has found.

    Attributes:
        builds: By the name of the module.
        trial: Runs the model once with the mechanisms in it; what they cannot do is raised there.
        refused: Attention that this host knows but cannot reach, and why.
        example_inputs: What the model takes, where a finder knew without being told.
    """

    builds: dict[str, Build]
    trial: Callable[[], None] | None = None
    refused: str = ""
    example_inputs: Any = None


Finder = Callable[[nn.Module, Any], Found]
FINDERS: dict[str, Finder] = {}


@singledispatch
def mount(module: nn.Module, make: MakeMechanism) -> Host:
    """Return a module that computes what `module` does, with attention by the mechanism that `make` builds.

    Raises:
        TypeError: No overload knows this kind of module.
    """
    load_hosts()
    if mount.dispatch(type(module)) is not _UNKNOWN:
        return mount(module, make)
    raise TypeError(f"no host knows {qualified_name(type(module))}; mountable: {', '.join(_mountable())}")


def inject(model: nn.Module, make: MakeMechanism, *, where: str | None = None, example_inputs: Any = None) -> list[str]:
    """Mount a mechanism into every attention module of `model` that a host knows, in place.

    Args:
        model: Any model.
        make: Builds one mechanism for each attention module.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        example_inputs: What the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. One forward
            on them shows where attention happens that no class gives away, and whether it is causal or cross.

    Returns:
        The names of the modules that were replaced; `mounted` says what stands there.

    Raises:
        ValueError: Nothing matched, the model already holds a mechanism there, or the mechanism cannot run there.
    """
    load_hosts()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = holding(model, "attention")
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    builds: dict[str, Build] = {}
    trials, refused = [], []
    for find in (FINDERS[host] for host in HOSTS if host in FINDERS):
        found = find(model, example_inputs)
        new = {name: build for name, build in found.builds.items() if not _inside(name, [*builds, *taken])}
        builds |= new
        example_inputs = found.example_inputs if example_inputs is None else example_inputs
        if found.trial and any(where is None or re.search(where, name) for name in new):
            trials.append(found.trial)
        refused += [found.refused] if found.refused else []
    for name, module in modules.items():
        if known(module) and not _inside(name, [*builds, *taken]):
            builds[name] = partial(mount, module)
    names = [name for name in modules if name in builds and (where is None or re.search(where, name))]
    if not names:
        raise ValueError(_nothing_matched(model, where, [*builds, *taken], refused))
    if "" in names:
        raise ValueError("the model is itself an attention module; call mount() on it")
    built: dict[nn.Module, Host | Guest] = {}
    try:
        for name in names:
            if modules[name] not in built:
                built[modules[name]] = builds[name](make)
    except Exception:
        for host in built.values():
            host.restore()
        raise
    for name in names:
        _place(model, name, built[modules[name]])
    for trial in trials:
        try:
            trial()
        except Exception as error:
            take_out(model, names)
            raise ValueError(f"the mechanism cannot run in {type(model).__name__}: {error}") from error
    for name in names:
        _log.info("%s: %s", name, _describe(model.get_submodule(name)))
    return names


def mounted(model: nn.Module) -> dict[str, str]:
    """Say which mechanism stands where, and which host put it there."""
    return {name: _describe(m) for name, m in model.named_modules() if holder(m) is not None}


_UNKNOWN = mount.dispatch(object)


def known(module: nn.Module) -> bool:
    """Return whether the class of a module alone tells how to mount it."""
    return mount.dispatch(type(module)) is not _UNKNOWN


def holder(module: nn.Module) -> Host | Guest | None:
    """Return what put a mechanism into this module, if it holds one."""
    return module if isinstance(module, Host) else module.__dict__.get("_guest")


def holding(model: nn.Module, part: str | None = None) -> list[str]:
    """Return the names of the modules that hold a mechanism, for one part of blocks ("attention") or for any."""
    held = ((name, holder(module)) for name, module in model.named_modules(remove_duplicate=False))
    return [name for name, host in held if host is not None and part in (None, host.part)]


def device_of(module: nn.Module) -> torch.device | None:
    """Return where the parameters of a module are."""
    return next((parameter.device for parameter in module.parameters()), None)


def _inside(name: str, others: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def load_hosts() -> None:
    """Register the overloads of every library that has been imported: a module of another cannot exist."""
    for host, library in HOSTS.items():
        if library in sys.modules:
            try:
                import_module(f"thresher.hosts.{host}")
            except ImportError as error:
                _log.warning("models of %s cannot be reached: %s", library, error)


def _place(model: nn.Module, name: str, host: Host | Guest) -> None:
    if isinstance(host, Host):
        replace(model, name, host)
    host.enter()


def take_out(model: nn.Module, names: list[str]) -> None:
    hosts = {name: holder(model.get_submodule(name)) for name in names}
    for name, host in hosts.items():
        if host is not None:
            replace(model, name, host.restore())


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _describe(module: nn.Module) -> str:
    host = holder(module)
    assert host is not None
    return f"{type(host).__name__}: {host.mechanism}"


def _mountable() -> list[str]:
    load_hosts()
    return [qualified_name(cls) for cls in mount.registry if cls is not object]


def _nothing_matched(model: nn.Module, where: str | None, there: list[str], refused: list[str]) -> str:
    if there:
        return f"no attention module matches {where!r}; there are: {', '.join(there)}"
    kinds = sorted({qualified_name(type(m)) for m in model.modules() if "attention" in type(m).__name__.lower()})
    seen = f"It has {', '.join(kinds)}. " if kinds else ""
    return (
        f"{type(model).__name__} has no attention module that a host knows. {seen}{' '.join([*refused, ''])}"
        f"Known: {', '.join(_mountable())}; with example_inputs, whatever calls F.scaled_dot_product_attention"
    )


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
