"""Thresher: train sparse attention.

The public functions are imported on first use, so that a command line can answer before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.calibration import calibrate
    from thresher.compute import ComputeMeter
    from thresher.hosts import densify, inject, mount, sparsify
    from thresher.hosts.huggingface_cache import coded_cache
    from thresher.loading import load_model

__all__ = ["ComputeMeter", "calibrate", "coded_cache", "densify", "inject", "load_model", "mount", "sparsify"]
__version__ = "0.1.0"

_HOMES = {
    "calibrate": "thresher.calibration",
    "coded_cache": "thresher.hosts.huggingface_cache",
    "ComputeMeter": "thresher.compute",
    "load_model": "thresher.loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "thresher.hosts")), name)
