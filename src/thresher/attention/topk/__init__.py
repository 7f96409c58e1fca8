"""Top-k: the mechanism, its parts, and its kernel with C++ sources."""

from thresher.attention.topk.cpu import TopKOnCpu
from thresher.attention.topk.mechanism import TopK

TopK.implementations = (TopKOnCpu(),)

__all__ = ["TopK"]
