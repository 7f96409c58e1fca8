"""LATTE: the mechanism, its parts, and its kernel with C++ sources."""

from thresher.attention.latte.cpu import DecodingOnCpu, TrainingOnCpu
from thresher.attention.latte.mechanism import Latte

Latte.implementations = (DecodingOnCpu(), TrainingOnCpu())

__all__ = ["Latte"]
