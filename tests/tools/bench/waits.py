"""Finds where the host waits for the device: wherever Python reads a number, or a size depends on values.

On a processor nothing waits, but the same calls are made: what reads a value here would stop a GPU's queue there. What
looks at values on a CPU alone asks `visibility.can_read_values` first, and is told here that it may not.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from thresher.attention.shared import visibility

# Operators whose result the host reads, or whose output is as long as the values say.
READING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "repeat_interleave.Tensor", "bincount", "allclose"),
}
# Methods of a tensor that hand its values to Python without an operator that a dispatcher sees on a processor.
METHODS = (
    *("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"),
)
METHODS_OF_TENSORS = {getattr(torch.Tensor, name) for name in METHODS}
# The optimiser counts its steps on the host, wherever the parameters are.
EXEMPT = ("torch/optim/",)
PACKAGES = ("/thresher/", "/pytorch_lightning/", "/torchmetrics/", "/torch/optim/", "/tests/tools/bench/")


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        if name in READING or name.partition(".")[0] in READING:
            self.note(name)
        if name.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.note("index by a mask")
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METHODS_OF_TENSORS:
            self.note(func.__name__)
        return func(*args, **kwargs or {})


def _asker() -> str:
    """Return the innermost place outside PyTorch that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename).as_posix()
        if Path(__file__).as_posix() != file and any(package in file for package in PACKAGES):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect, as "operator at file:line", what would make the host wait; the list fills while it is entered."""
    found: list[str] = []

    def note(name: str) -> None:
        asker = _asker()
        if not any(part in asker for part in EXEMPT):
            found.append(f"{name} at {asker}")

    with patch.object(visibility, "can_read_values", return_value=False), _Methods(note), _Operators(note):
        yield found
