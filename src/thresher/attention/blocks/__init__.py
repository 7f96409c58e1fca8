"""Blocks: LATTE for blocks of queries that share their keys."""

from thresher.attention.blocks.mechanism import Blocks

__all__ = ["Blocks"]
