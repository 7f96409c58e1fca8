"""A host that runs the module it replaces, instead of repeating its arithmetic."""

from typing import Any

from torch import nn

from thresher.attention.mechanism import Mechanism
from thresher.hosts.core import Host


class Wrapper(Host):
    """A host that shares the parameters, buffers, children and attributes of the module it replaces.

    Both use the same tables, so a change of an entry applies to both.
    """

    mechanism: Mechanism

    def __init__(self, original: nn.Module, mechanism: Mechanism) -> None:
        super().__init__(original, mechanism)
        original._modules["mechanism"] = mechanism
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self._non_persistent_buffers_set = original._non_persistent_buffers_set

    @property
    def original(self) -> nn.Module:
        """The replaced module, in the mode of this one."""
        (original,) = self._original
        if original.training != self.training:
            original.training = self.training
        return original

    def restore(self) -> nn.Module:
        """Return the replaced module, without the mechanism."""
        (original,) = self._original
        original._modules.pop("mechanism", None)
        return original.train(self.training)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._original[0]._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._original[0]._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_original" not in self.__dict__:
                raise
            return getattr(self._original[0], name)
