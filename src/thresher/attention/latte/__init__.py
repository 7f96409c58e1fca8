"""LATTE: the mechanism, its parts, and its kernels for CPUs and GPUs."""

from thresher.attention.latte.cpu import DecodingOnCpu, TrainingOnCpu
from thresher.attention.latte.gpu import LatteOnGpu
from thresher.attention.latte.mechanism import Latte

Latte.implementations = (DecodingOnCpu(), TrainingOnCpu(), LatteOnGpu())

__all__ = ["Latte", "LatteOnGpu"]
