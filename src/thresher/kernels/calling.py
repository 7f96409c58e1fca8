"""How operators call the functions of a library: tensors as pointers, numbers as 64-bit ones."""

import ctypes
import functools

import torch
from torch import Tensor

from thresher.kernels.build import library


def call(kernel: str, function: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call `<function>_<dtype>` of the library `kernel`, with torch's number of threads as the last argument.

    Tensors must be contiguous, and of the types that the function expects; None is a null pointer.

    Raises:
        KernelError: The library cannot be built or loaded.
    """
    run = getattr(library(kernel), f"{function}_{str(dtype).removeprefix('torch.')}")
    run.restype = None
    run(*map(_passed, arguments), ctypes.c_int64(torch.get_num_threads()))


def readable(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values as operators read them: of one type, fp32 where it would be fp16."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    return tuple(x.to(torch.float32 if dtype == torch.float16 else dtype) for x in inputs)


def summed(x: Tensor) -> torch.dtype:
    """Return the type that sums of such numbers are made in: fp32 for bf16."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype


def _passed(x: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(x, Tensor):
        assert x.is_contiguous(), "a kernel reads contiguous tensors"
        return ctypes.c_void_p(x.data_ptr())
    if x is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)
