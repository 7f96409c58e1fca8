"""MCA: the mechanism, its parts, and its kernel with C++ sources."""

from thresher.attention.mca.cpu import McaOnCpu
from thresher.attention.mca.mechanism import Mca

Mca.implementations = (McaOnCpu(),)

__all__ = ["Mca"]
