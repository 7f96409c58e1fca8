"""Which code computes a call: PyTorch, which defines the mechanism, or a kernel that computes the same faster.

`reference` is PyTorch. `cpu` is the kernel, and an error where it cannot serve. `auto` is the kernel wherever it can
serve: on CPU tensors of one floating-point type, in calls whose features it has, if it builds on this machine.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from thresher.attention.options import check_choice
from thresher.kernels.build import KernelError, library, usable

Backend = Literal["auto", "reference", "cpu"]


def check_backend(backend: Backend, kernel: str) -> None:
    """Refuse, when a mechanism is built, a backend that does not exist or cannot work on this machine.

    Raises:
        ValueError: `backend` is none of the choices, or is "cpu" and the kernel does not build.
    """
    check_choice("backend", backend, get_args(Backend))
    if backend == "cpu":
        try:
            library(kernel)
        except KernelError as error:
            wanted = "backend=cpu needs a kernel that is not to be had; backend=auto needs none"
            raise ValueError(f"{wanted}. {error}") from error


def served_by_kernel(backend: Backend, kernel: str, inputs: tuple[Tensor, ...], obstacle: str | None) -> bool:
    """Decide whether a call goes to the kernel.

    Whoever calls a kernel gives it one type, fp32 in place of fp16, and of bf16 where the kernel does not read it:
    `kernels.calling.readable`. `torch.compile` can trace this.

    Args:
        backend: The choice of the user.
        kernel: Name of the kernel.
        inputs: The tensors that it would read.
        obstacle: Why the kernel cannot serve this very call, if the mechanism knows of a reason.

    Raises:
        ValueError: `backend` is "cpu", and there is an obstacle.
    """
    if backend == "reference":
        return False
    obstacle = obstacle or _obstacle(inputs)
    if backend == "cpu" and obstacle is not None:
        raise ValueError(
            f"backend=cpu cannot compute this call of {kernel}: {obstacle}; backend=auto falls back to PyTorch"
        )
    return obstacle is None and usable(kernel)


def _obstacle(inputs: tuple[Tensor, ...]) -> str | None:
    for x in inputs:
        if x.device.type != "cpu":
            return f"its tensors are on {x.device.type}"
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"its tensors are {x.dtype}"
    if len({x.dtype == torch.float64 for x in inputs}) > 1:
        return "some of its tensors are torch.float64, others are not"
    return None
