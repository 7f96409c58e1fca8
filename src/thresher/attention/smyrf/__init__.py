"""SMYRF: the mechanism, its parts, and its kernel with C++ sources."""

from thresher.attention.smyrf.cpu import SmyrfOnCpu
from thresher.attention.smyrf.mechanism import Smyrf

Smyrf.implementations = (SmyrfOnCpu(),)

__all__ = ["Smyrf"]
