"""Peak memory of one call, beyond the memory in use before it.

CUDA   the allocator's own peak.
Linux  the peak resident size, VmHWM, which a process may reset for itself through /proc/self/clear_refs. Freed pages
       are handed back beforehand (`malloc_trim`), so that a call cannot hide in them.
Else   the peak resident size since the process began (`ru_maxrss`): right for the first call of a fresh process only.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")


def can_reset(device: str) -> bool:
    """Tell whether the peak of several calls of one process can be measured."""
    return device.startswith("cuda") or _reset()


def measure_growth(run: Callable[[], object], device: str) -> float:
    """Measure the largest growth of this process's memory while `run` runs, in MiB."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    _hand_back()
    if _reset():
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0) / 1024
    before = _peak_since_start()
    run()
    return (_peak_since_start() - before) / MIB


def _hand_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Read an entry of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _peak_since_start() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
