"""Blocks: LATTE for blocks of queries that share their keys, its kernels, and gathered keys in PyTorch."""

from thresher.attention.blocks.cpu import BlocksOnCpu, DecodingBlocksOnCpu
from thresher.attention.blocks.flex import FlexAttention
from thresher.attention.blocks.gather import Gathering
from thresher.attention.blocks.gpu import BlocksOnGpu
from thresher.attention.blocks.mechanism import Blocks

Blocks.implementations = (DecodingBlocksOnCpu(), BlocksOnCpu(), BlocksOnGpu(), Gathering(), FlexAttention())

__all__ = ["Blocks", "BlocksOnGpu"]
