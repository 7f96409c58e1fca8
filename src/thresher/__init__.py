"""Thresher: train sparse attention.

The public functions are imported on first use, so that a command line can answer before torch is there.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.budget.allocation import allocate
    from thresher.budget.calibration import calibrate
    from thresher.budget.meter import ComputeMeter
    from thresher.budget.tuning import tune
    from thresher.checkpoints.rebuild import load_model
    from thresher.hosts import densify, inject, mount, sparsify
    from thresher.hosts.huggingface.cache import coded_cache
    from thresher.hosts.saving import load_adapter, push_adapter, save_adapter

__all__ = [
    "ComputeMeter",
    "allocate",
    "calibrate",
    "coded_cache",
    "densify",
    "inject",
    "load_adapter",
    "load_model",
    "mount",
    "push_adapter",
    "save_adapter",
    "sparsify",
    "tune",
]
__version__ = version("thresher")

_HOMES = {
    "allocate": "thresher.budget.allocation",
    "calibrate": "thresher.budget.calibration",
    "coded_cache": "thresher.hosts.huggingface.cache",
    "ComputeMeter": "thresher.budget.meter",
    "load_adapter": "thresher.hosts.saving",
    "load_model": "thresher.checkpoints.rebuild",
    "push_adapter": "thresher.hosts.saving",
    "save_adapter": "thresher.hosts.saving",
    "tune": "thresher.budget.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "thresher.hosts")), name)
