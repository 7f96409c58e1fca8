"""Blocks: LATTE for blocks of queries that share their keys, and its implementation by gathered keys."""

from thresher.attention.blocks.gather import Gathering
from thresher.attention.blocks.mechanism import Blocks

Blocks.implementations = (Gathering(),)

__all__ = ["Blocks"]
