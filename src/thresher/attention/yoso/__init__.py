"""YOSO: the mechanism, its parts, and its kernel with C++ sources."""

from thresher.attention.yoso.cpu import YosoOnCpu
from thresher.attention.yoso.mechanism import Yoso

Yoso.implementations = (YosoOnCpu(),)

__all__ = ["Yoso"]
