"""Blocks: LATTE for blocks of queries that share their keys, its kernel, and gathered keys in PyTorch."""

from thresher.attention.blocks.cpu import BlocksOnCpu, DecodingBlocksOnCpu
from thresher.attention.blocks.gather import Gathering
from thresher.attention.blocks.mechanism import Blocks

Blocks.implementations = (DecodingBlocksOnCpu(), BlocksOnCpu(), Gathering())

__all__ = ["Blocks"]
