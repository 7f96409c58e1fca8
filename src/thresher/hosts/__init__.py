"""Put mechanisms into existing models."""

from thresher.hosts.core import inject, mount, mounted
from thresher.hosts.public import densify, sparsify

__all__ = ["densify", "inject", "mount", "mounted", "sparsify"]
