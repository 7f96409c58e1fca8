"""What this machine is, and which versions are installed; nothing is imported for it but torch."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from thresher.kernels.build import KernelError, cache_folder, toolchain

NEEDED = (
    *("torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "hydra-core", "omegaconf", "wandb"),
    *("safetensors", "numpy"),
)
# Instructions that kernels profit from, as /proc/cpuinfo calls them.
INSTRUCTIONS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def versions() -> dict[str, str | None]:
    """Return the versions of what the package needs, and of what its extras add; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "thresher": _version("thresher")}
    return found | {name: _version(name) for name in (*NEEDED, *optional())}


def optional() -> dict[str, str]:
    """Return the packages of the extras that users install, and the first extra that has each."""
    found: dict[str, str] = {}
    try:
        lines = requires("thresher") or []
    except PackageNotFoundError:  # run from its sources
        lines = []
    for line in lines:
        name, extra = re.match(r"[A-Za-z0-9_.-]+", line), re.search(r"extra == ['\"]([a-z]+)['\"]", line)
        if name and extra and extra[1] not in ("test", "dev") and name[0] != "thresher":
            found.setdefault(name[0], extra[1])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return what computes here: processor, threads, compiler, accelerators."""
    model, flags = _processor()
    try:
        compiler = toolchain().version
    except KernelError as error:
        compiler = f"none: {error}"
    try:
        kernels = str(cache_folder())
    except KernelError as error:
        kernels = f"nowhere: {error}"
    return {
        "system": "{0.system} {0.release}".format(platform.uname()),
        "processor": model,
        "architecture": platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "kernels are kept in": kernels,
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [why_no_cuda()],
    }


def why_no_cuda() -> str:
    """Say why PyTorch sees no CUDA device."""
    if torch.version.cuda is None:
        return "off: this torch was built for CPUs only"
    return f"off: torch was built for CUDA {torch.version.cuda}, but sees no device or driver"


def _processor() -> tuple[str, set[str]]:
    """Return the name of the processor and what it can do, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown", set()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features", ""))
    return told.get("model name", platform.processor() or "unknown"), set(flags.split())
