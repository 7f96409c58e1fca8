"""Putting a mechanism into somebody else's model; `core.py` is what users call."""

from thresher.hosts.core import densify, inject, mount, sparsify

__all__ = ["densify", "inject", "mount", "sparsify"]
