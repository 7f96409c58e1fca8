"""Replace the attention of a model by a mechanism, and restore it.

`mount` turns one attention module into one that runs a mechanism. Each library adds an overload for its own class, in
a file that is imported only if that library is (see `timm.py`). If the class of a module does not show that it
attends, a finder searches the whole model (see `sdpa.py`, `huggingface/host.py`).
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

from thresher.attention.mechanism import MakeMechanism, Mechanism, Metered
from thresher.attention.shared.visibility import wait_for_checks
from thresher.hosts.peft import check_adapters, find_running, warn_when_frozen
from thresher.hosts.recipes import build_recipe, restore_make
from thresher.hosts.recording import call_model, evaluation_mode

# The file of each host, in the order of the search, and the library whose modules it supports.
HOSTS = {"timm": "timm", "huggingface": "transformers", "multihead": "torch", "sdpa": "torch"}
_log = logging.getLogger(__name__)


class Host(nn.Module):
    """An attention or feed-forward module that runs a mechanism in place of its own arithmetic.

    It takes over the children of the module that it replaces, under their names, so that state-dict keys stay the
    same and dense checkpoints load.

    Args:
        original: The module to replace; `restore` returns it.
        mechanism: The mechanism that runs inside.
        dropout: Dropout of attention weights, or of hidden units, in the original.

    Attributes:
        part: The part of a block: "attention" or "feed-forward".
        kind: Key of the function in `RESTORERS` that mounts it again when a saved model is loaded.
        recipe: The arguments of that function, as plain values for a configuration file.
    """

    part: ClassVar[str] = "attention"
    kind: ClassVar[str] = "module"
    mechanism: Metered
    recipe: dict[str, Any] | None = None

    def __init__(self, original: nn.Module, mechanism: Metered, dropout: float = 0.0) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        mechanism.dropout = dropout
        warn_when_frozen(mechanism)
        self.mechanism = mechanism.to(find_device(original))
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        self.train(original.training)

    def enter(self) -> None:
        """Adapt the surroundings of the module, once it is in place."""

    def restore(self) -> nn.Module:
        """Return the replaced module, with the current children."""
        (original,) = self._original
        for name, child in self.named_children():
            if name != "mechanism":
                setattr(original, name, child)
        return original.train(self.training)


class Guest:
    """A mechanism inside an attention module, which keeps its class and its place.

    Args:
        module: The attention module.
        mechanism: Becomes its child `mechanism`.
    """

    part: ClassVar[str] = "attention"
    kind: ClassVar[str] = "module"
    recipe: dict[str, Any] | None = None

    def __init__(self, module: nn.Module, mechanism: Mechanism) -> None:
        warn_when_frozen(mechanism)
        self.module = module
        self._waiting: Mechanism | None = mechanism.to(find_device(module)).train(module.training)

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism that runs in the module; other libraries may have replaced it by a copy."""
        return self._waiting or find_running(self.module.mechanism)  # type: ignore[arg-type]

    @property
    def idle(self) -> str:
        """The reason why the model does not call the mechanism; empty if it does."""
        return ""

    def enter(self) -> None:
        """Enter the module."""
        if self._waiting is not None:
            self.module.mechanism, self._waiting = self._waiting, None
        self.module._guest = self  # type: ignore[assignment]

    def restore(self) -> nn.Module:
        """Leave the module, and return it unchanged."""
        if self.module.__dict__.pop("_guest", None) is self:
            del self.module.mechanism
        return self.module


class Build(Protocol):
    """Builds a host for one attention module with the mechanism of `make`; does not change the model."""

    def __call__(self, make: MakeMechanism) -> Host | Guest: ...


@dataclass(frozen=True)
class Findings:
    """The attention modules that a finder found.

    Attributes:
        builds: Builders of hosts by module name.
        trials: Models and inputs to run once with the mechanisms, so that unsupported calls raise at once.
        refused: Attention that the finder recognises but cannot replace, with the reason.
        example_inputs: Inputs of the model, if the finder built them itself.
        left_out: Names of attention modules whose pattern is unknown.
    """

    builds: dict[str, Build]
    trials: tuple[tuple[nn.Module, Any], ...] = ()
    refused: str = ""
    example_inputs: Any = None
    left_out: tuple[str, ...] = ()


Finder = Callable[[nn.Module, Any], Findings]
FINDERS: dict[str, Finder] = {}
# By kind of host: mounts a mechanism again, from the model, the name of the module in it, the module and the recipe.
Restore = Callable[[nn.Module, str, nn.Module, dict[str, Any]], Host | Guest]
RESTORERS: dict[str, Restore] = {}
# Called with a model after mechanisms were mounted or removed.
WATCHERS: list[Callable[[nn.Module], None]] = []


@singledispatch
def mount(module: nn.Module, make: MakeMechanism) -> Host:
    """Build a module that computes what `module` does, with attention by the mechanism that `make` builds.

    Raises:
        TypeError: No overload supports this class.
    """
    load_hosts()
    if mount.dispatch(type(module)) is not _UNKNOWN:
        return mount(module, make)
    raise TypeError(f"no host knows {format_class(type(module))}; mountable: {', '.join(_list_mountable())}")


def inject(model: nn.Module, make: MakeMechanism, *, where: str | None = None, example_inputs: Any = None) -> list[str]:
    """Mount a mechanism into every attention module of `model` that a host supports, in place.

    Args:
        model: Any model.
        make: Builds one mechanism for each attention module.
        where: Regular expression that a module's dotted name must contain; all of them by default.
        example_inputs: Inputs of the model: a tensor, a tuple of arguments or a dict of keyword arguments. One forward
            on them finds attention that no class name shows, and whether it is causal or cross.

    Returns:
        The names of the replaced modules; `mounted` describes them.

    Raises:
        ValueError: Nothing matched, the model already holds a mechanism there, or the mechanism cannot run there.
    """
    load_hosts()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = find_holders(model, "attention")
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    builds: dict[str, Build] = {}
    trials: list[tuple[nn.Module, Any]] = []
    refused, left_out = [], list(taken)
    for find in (FINDERS[host] for host in HOSTS if host in FINDERS):
        found = find(model, example_inputs)
        new = {name: build for name, build in found.builds.items() if not _is_inside(name, [*builds, *taken])}
        builds |= new
        example_inputs = found.example_inputs if example_inputs is None else example_inputs
        if any(where is None or re.search(where, name) for name in new):
            trials += found.trials
        refused += [found.refused] if found.refused else []
        left_out += found.left_out
    for name, module in modules.items():
        if is_mountable(module) and not _is_inside(name, [*builds, *left_out]):
            builds[name] = partial(mount, module)
    names = [name for name in modules if name in builds and (where is None or re.search(where, name))]
    if not names:
        raise ValueError(_explain_no_match(model, where, [*builds, *taken], refused))
    if "" in names:
        raise ValueError("the model is itself an attention module; call mount() on it")
    built: dict[nn.Module, Host | Guest] = {}
    try:
        for name in names:
            if modules[name] not in built:
                built[modules[name]] = record_recipe(builds[name](make), make)
                check_adapters(model, built[modules[name]].mechanism)
    except Exception:
        for host in built.values():
            host.restore()
        raise
    for name in names:
        place(model, name, built[modules[name]])
    for whole, inputs in trials:
        try:
            with wait_for_checks():
                _try_out(whole, inputs)
        except Exception as error:
            take_out(model, names)
            raise ValueError(f"the mechanism cannot run in {type(model).__name__}: {error}") from error
    notify_watchers(model)
    for name in names:
        _log.info("%s: %s", name, _describe(model.get_submodule(name)))
    return names


def _try_out(model: nn.Module, example_inputs: Any) -> None:
    """Run a model once with its mechanisms, and with the attention dropout that training asks for."""
    with evaluation_mode(model):
        for module in model.modules():
            if find_host(module) is not None:
                module.training = True
        call_model(model, example_inputs)


def mounted(model: nn.Module) -> dict[str, str]:
    """Describe the mechanism and the host of each module that holds one, by name."""
    return {name: _describe(m) for name, m in model.named_modules() if find_host(m) is not None}


_UNKNOWN = mount.dispatch(object)


def _restore(model: nn.Module, name: str, module: nn.Module, recipe: dict[str, Any]) -> Host:
    return mount(module, restore_make(recipe))


RESTORERS["module"] = _restore


def is_mountable(module: nn.Module) -> bool:
    """Tell whether the class of a module alone decides how to mount it."""
    return mount.dispatch(type(module)) is not _UNKNOWN


def find_host(module: nn.Module) -> Host | Guest | None:
    """Find the host of a module; None if it holds no mechanism."""
    return module if isinstance(module, Host) else module.__dict__.get("_guest")


def find_holders(model: nn.Module, part: str | None = None) -> list[str]:
    """Find the names of the modules that hold a mechanism, in one part of blocks ("attention") or in any."""
    held = ((name, find_host(module)) for name, module in model.named_modules(remove_duplicate=False))
    return [name for name, host in held if host is not None and part in (None, host.part)]


def find_device(module: nn.Module) -> torch.device | None:
    """Find the device of the parameters of a module; None without parameters."""
    return next((parameter.device for parameter in module.parameters()), None)


def _is_inside(name: str, others: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def load_hosts() -> None:
    """Register the overloads of every imported library; no model can hold modules of another."""
    for host, library in HOSTS.items():
        if library in sys.modules:
            try:
                import_module(f"thresher.hosts.{host}")
            except ImportError as error:
                _log.warning("models of %s cannot be reached: %s", library, error)


def record_recipe(host: Host | Guest, make: Callable[..., Metered]) -> Any:
    """Record how the mechanism of a host was made, for files that store it."""
    host.recipe = {"host": host.kind, **build_recipe(make, host.mechanism), **(host.recipe or {})}
    return host


def notify_watchers(model: nn.Module) -> None:
    """Call all `WATCHERS` after the mechanisms of a model have changed."""
    for watcher in WATCHERS:
        watcher(model)


def place(model: nn.Module, name: str, host: Host | Guest) -> None:
    """Put a host into its place in a model."""
    if isinstance(host, Host):
        replace(model, name, host)
    host.enter()


def take_out(model: nn.Module, names: list[str]) -> None:
    hosts = {name: find_host(model.get_submodule(name)) for name in names}
    for name, host in hosts.items():
        if host is not None:
            replace(model, name, host.restore())
    notify_watchers(model)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _describe(module: nn.Module) -> str:
    host = find_host(module)
    assert host is not None
    idle = host.idle if isinstance(host, Guest) else ""
    return f"{type(host).__name__}: {find_running(host.mechanism)}{idle and f' ({idle})'}"


def _list_mountable() -> list[str]:
    load_hosts()
    return [format_class(cls) for cls in mount.registry if cls is not object]


def _explain_no_match(model: nn.Module, where: str | None, there: list[str], refused: list[str]) -> str:
    if there:
        return " ".join([f"no attention module matches {where!r}; there are: {', '.join(there)}", *refused])
    kinds = sorted({format_class(type(m)) for m in model.modules() if "attention" in type(m).__name__.lower()})
    seen = f"It has {', '.join(kinds)}. " if kinds else ""
    return (
        f"{type(model).__name__} has no attention module that a host knows. {seen}{' '.join([*refused, ''])}"
        f"Known: {', '.join(_list_mountable())}; with example_inputs, whatever calls F.scaled_dot_product_attention"
    )


def format_class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
