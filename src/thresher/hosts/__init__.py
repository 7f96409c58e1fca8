"""Putting a mechanism into somebody else's model; `core.py` is what users call."""

from thresher.hosts.core import inject, mount, mounted
from thresher.hosts.public import densify, sparsify

__all__ = ["densify", "inject", "mount", "mounted", "sparsify"]
