"""Find triton, say why it cannot serve, and launch its kernels: tuned on a GPU, plain under the interpreter.

Triton is imported by the first call that wants it. With TRITON_INTERPRET=1, set before that, its interpreter runs the
same kernels on CPUs, slowly, for tests.
"""

import functools
import importlib
from typing import Any

import torch

CAPABILITY = (8, 0)  # with products of int8 and of bf16
WIDEST = 256
BODIES = {
    "describe_rows": "choice",
    "add_votes": "choice",
    "mark_chosen": "choice",
    "attend_lists": "forward",
    "back_lists": "backward",
    "back_tiles": "backward",
}
WARPS, STAGES = (4, 8), (2, 3)  # what is tuned


@functools.cache
def explain_missing_triton() -> str | None:
    """Explain why triton cannot be imported; None if it can."""
    try:
        importlib.import_module("triton.language")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    except Exception as error:  # a broken installation fails in many ways
        return f"triton is broken here ({type(error).__name__}: {error})"
    return None


@functools.cache
def interprets() -> bool:
    """Tell whether triton interprets kernels on CPUs."""
    return explain_missing_triton() is None and bool(importlib.import_module("triton").knobs.runtime.interpret)


def explain_unusable(device: torch.device, dtypes: set[torch.dtype], widths: tuple[int, int]) -> str | None:
    """Explain why the kernels cannot serve tensors; None if they can.

    Args:
        device: Device of the tensors.
        dtypes: Their types.
        widths: Lengths of keys and of values.
    """
    if device.type != "cuda" and (device.type != "cpu" or explain_missing_triton() is not None or not interprets()):
        return f"its kernels are for CUDA, and the tensors are on {device.type}"
    if (missing := explain_missing_triton()) is not None:
        return missing
    if device.type == "cuda" and (reason := _explain_device(device)) is not None:
        return reason
    if torch.float64 in dtypes:
        return "it has no kernels for torch.float64"
    if max(widths) > WIDEST:
        return f"its heads have at most {WIDEST} dimensions, and these have {max(widths)}"
    return None


@functools.cache
def _explain_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for CUDA, and this torch is for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return "it needs compute capability {}.{}, and this GPU has {}.{}".format(*CAPABILITY, *capability)
    return None


def launch(name: str, programs: int, device: torch.device, **arguments: Any) -> None:
    """Launch a kernel with its arguments by name.

    Multiplications and additions are not fused: a kernel that rounds an estimate in another way than the one that
    found the best of its row would drop the best key at a threshold of 0.

    Args:
        name: Name of the kernel, one of `BODIES`.
        programs: Number of programs.
        device: Where the tensors are.
        **arguments: Tensors, numbers and constants.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            tune(name)[(programs,)](**arguments, enable_fp_fusion=False)
    else:
        load_body(name)[(programs,)](**arguments, enable_fp_fusion=False)


@functools.cache
def load_body(name: str) -> Any:
    """Load a kernel, which imports triton."""
    return getattr(importlib.import_module(f"thresher.kernels.triton.{BODIES[name]}"), name)


@functools.cache
def tune(name: str) -> Any:
    """Wrap a kernel so that its first call with new constants finds the fastest numbers of warps and stages."""
    triton, kernel = importlib.import_module("triton"), load_body(name)
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in WARPS for stages in STAGES]
    constants = [each.name for each in kernel.params if each.is_constexpr]
    added = [each for each in ("grad_k", "grad_v") if each in kernel.arg_names]
    return triton.autotune(configs, key=constants, reset_to_zero=added)(kernel)
