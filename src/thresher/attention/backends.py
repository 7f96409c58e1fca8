"""Choose the code that computes a call: PyTorch, which defines the mechanism, or a faster implementation.

`backend=reference` is PyTorch. `backend=cpu` is the CPU kernel, `backend=triton` the kernels for CUDA, `backend=gather`
PyTorch that gathers kept keys, `backend=flex` PyTorch's FlexAttention; each is an error where it cannot compute the
call. `backend=auto` is the first implementation that can: it supports the device and the features of the call, and its
kernel builds on this machine. If there is none, it is the reference.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from thresher.attention.contract import Attended
from thresher.attention.options import check_choice
from thresher.attention.prepared import Prepared
from thresher.kernels.build import KernelError, can_use, load_library

Backend = Literal["auto", "reference", "cpu", "triton", "gather", "flex"]
M = TypeVar("M")
READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Implementation(ABC, Generic[M]):
    """A faster way to compute what `Mechanism.reference` defines; it holds no state.

    Attributes:
        backend: Value of `backend=` that selects it.
        device: Type of device that tensors must be on; None is any.
        kernel: Name of its kernel; None needs none.
    """

    backend: ClassVar[Backend] = "cpu"
    device: ClassVar[str | None] = "cpu"
    kernel: ClassVar[str | None]

    @abstractmethod
    def explain_refusal(self, mechanism: M, x: Prepared) -> str | None:
        """Explain why the kernel cannot compute a call; None if it can. Device and types are checked elsewhere."""

    @abstractmethod
    def run(self, mechanism: M, x: Prepared) -> Attended:
        """Compute a call whose hidden and non-finite tokens are zero; tokens keep their original types."""


def check_backend(backend: Backend, implementations: Sequence[Implementation[M]]) -> None:
    """Check that a backend exists for a mechanism and works on this machine.

    Raises:
        ValueError: `backend` is none of the choices, or its kernel does not build.
    """
    own = dict.fromkeys(implementation.backend for implementation in implementations)
    check_choice("backend", backend, ("auto", "reference", *own))
    for implementation in implementations:
        if implementation.backend == backend and implementation.kernel is not None:
            try:
                load_library(implementation.kernel)
            except KernelError as error:
                raise ValueError(
                    f"backend={backend} needs a kernel that does not build here; backend=auto needs none. {error}"
                ) from error


def choose_implementation(
    mechanism: M, backend: Backend, implementations: Sequence[Implementation[M]], x: Prepared
) -> Implementation[M] | None:
    """Choose the first implementation that can compute a call; None means PyTorch. `torch.compile` can trace this.

    Raises:
        ValueError: `backend` selects implementations, and none of them can.
    """
    if backend == "reference":
        return None
    refused = None
    for implementation in implementations:
        if backend in ("auto", implementation.backend):
            tensors = (x.grouped_q, x.grouped_k, x.grouped_v)
            refused = implementation.explain_refusal(mechanism, x) or explain_unreadable(tensors, implementation.device)
            if refused is None and (implementation.kernel is None or can_use(implementation.kernel)):
                return implementation
    if backend != "auto" and refused is not None:
        raise ValueError(
            f"backend={backend} cannot compute this call of {type(mechanism).__name__}: {refused}; "
            "backend=auto falls back to PyTorch"
        )
    return None


def explain_unreadable(tensors: Sequence[Tensor], device: str | None) -> str | None:
    """Explain why an implementation cannot read tensors; None if it can."""
    for x in tensors:
        if device is not None and x.device.type != device:
            return f"its tensors are on {x.device.type}"
        if x.dtype not in READABLE:
            return f"its tensors are {x.dtype}"
    if len({x.dtype == torch.float64 for x in tensors}) > 1:
        return "some of its tensors are torch.float64, others are not"
    return None
