"""The machine and the installed versions, found without importing any package but torch."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from thresher.kernels.build import KernelError, find_cache_folder, find_toolchain

NEEDED = (
    *("torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "hydra-core", "omegaconf", "wandb"),
    *("safetensors", "numpy"),
)
# Instructions that make kernels faster, by their names in /proc/cpuinfo.
INSTRUCTIONS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def find_versions() -> dict[str, str | None]:
    """Find the versions of the required packages and of those of extras; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "thresher": _find_version("thresher")}
    return found | {name: _find_version(name) for name in (*NEEDED, *find_extras())}


def find_extras() -> dict[str, str]:
    """Find the packages of the extras for users, and the first extra that holds each."""
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


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """Describe processor, threads, compiler and accelerators."""
    model, flags = _read_processor()
    try:
        compiler = find_toolchain().version
    except KernelError as error:
        compiler = f"none: {error}"
    try:
        kernels = str(find_cache_folder())
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
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [explain_missing_cuda()],
    }


def explain_missing_cuda() -> str:
    """Explain why PyTorch sees no CUDA device."""
    if torch.version.cuda is None:
        return "off: this torch was built for CPUs only"
    return f"off: torch was built for CUDA {torch.version.cuda}, but sees no device or driver"


def _read_processor() -> tuple[str, set[str]]:
    """Read the name and the flags of the processor, where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown", set()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", entries.get("Features", ""))
    return entries.get("model name", platform.processor() or "unknown"), set(flags.split())
