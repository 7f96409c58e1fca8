"""Find the linear layer that projects values, by the memory that they share with its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from thresher.attention.contract import ValueSource


class Projection:
    """A linear layer of an attention module, and the rows of its weight that project the values.

    Args:
        module: The attention module.
        name: The layer's name in it.
        rows: The output features that are the values, head by head.
        transposed: Whether its weight is [in, out].
    """

    def __init__(self, module: nn.Module, name: str, rows: slice | Int[Tensor, " hd"], transposed: bool) -> None:
        self.module, self.name, self.rows, self.transposed = module, name, rows, transposed
        self.layer = module.get_submodule(name)
        self.x: Tensor | None = None
        self.handle: Any = None

    @classmethod
    def from_words(cls, module: nn.Module, words: dict[str, Any]) -> "Projection":
        """Build the projection that `words` describe."""
        rows = words["rows"]
        kept = torch.tensor(rows, device="cpu") if isinstance(rows, list) else slice(rows["first"], rows["end"])
        return cls(module, words["name"], kept, words["transposed"])

    @property
    def words(self) -> dict[str, Any]:
        """The projection as plain values for a configuration file."""
        rows: Any = self.rows
        kept = {"first": rows.start, "end": rows.stop} if isinstance(rows, slice) else rows.tolist()
        return {"name": self.name, "rows": kept, "transposed": self.transposed}

    def watch(self) -> None:
        """Keep the input of the layer until `build_source` takes it."""
        self.handle = self.layer.register_forward_hook(self._keep)

    def forget(self) -> None:
        """Stop keeping inputs."""
        self.handle.remove()

    def _keep(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.x = args[0]

    def build_source(self, b: int, m: int) -> ValueSource:
        """Build the source of m values of b examples in this forward.

        Raises:
            ValueError: Some values were cached, or the layer has been replaced.
        """
        x, self.x = self.x, None
        if x is None or x.shape[:2] != (b, m):
            raise ValueError(f"some values come from a cache, not from {self.name} in this call")
        if self.module.get_submodule(self.name) is not self.layer:
            raise ValueError(f"{self.name} was replaced after mounting; call densify(), then mount again")
        layer: Any = self.layer
        weight, bias = layer.weight.T if self.transposed else layer.weight, layer.bias
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(weight.device)
        return ValueSource(x, weight[rows], None if bias is None else bias[rows])


class Projections:
    """The outputs of the linear layers of a forward, by memory address.

    Args:
        transposed: Classes of linear layers whose weights are [in, out].
    """

    def __init__(self, *transposed: type[nn.Module]) -> None:
        self.transposed = transposed
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record every output of a linear layer."""
        handle = nn.modules.module.register_module_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()
            self.outputs = {}

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if type(module) in (nn.Linear, *self.transposed):
            self.outputs[output.untyped_storage().data_ptr()] = (module, output)

    def find(self, value: Tensor, module: nn.Module) -> Projection | None:
        """Find the projection of values [b, h, m, d]; None if no layer in `module` has them in its output."""
        layer, out = self.outputs.get(value.untyped_storage().data_ptr(), (None, None))
        self.outputs = {}
        names = [name for name, child in module.named_modules() if child is layer]
        if out is None or not names or out.ndim != 3 or not out.is_contiguous():
            return None
        (b, h, m, d), (of_example, of_head, of_token, of_feature) = value.shape, value.stride()
        if (b, m) != out.shape[:2] or (of_example, of_token) != out.stride()[:2]:
            return None
        rows = (torch.arange(h)[:, None] * of_head + torch.arange(d) * of_feature).flatten()
        rows += int(value.storage_offset()) - int(out.storage_offset())
        first, size = int(rows[0]), len(rows)
        together = torch.equal(rows, torch.arange(first, first + size))
        kept = slice(first, first + size) if together else rows.to(value.device)
        return Projection(module, names[0], kept, type(layer) in self.transposed)
