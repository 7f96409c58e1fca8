"""Options of blocks: how many queries share keys, how they choose them, how thresholds are trained."""

from dataclasses import dataclass
from typing import Literal, get_args

from thresher.attention.latte.options import GateOptions
from thresher.attention.options import check_choice, check_integer

Share = Literal["auto", "vote", "union"]


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How many queries share keys, and how they choose them.

    Attributes:
        queries: Consecutive queries in a block.
        share: "vote": the queries of a block choose together, where nothing is causal. "union": each query chooses for
            itself, and the block computes all that any of them chose. "auto": a vote where nothing is causal.
        every: 1 lets each query of a block vote, 8 each eighth.
    """

    queries: int = 64
    share: Share = "auto"
    every: int = 1

    def __post_init__(self) -> None:
        check_integer("block.queries", self.queries, 1)
        check_choice("block.share", self.share, get_args(Share))
        check_integer("block.every", self.every, 1)
        if self.every > 1 and self.share == "union":
            raise ValueError("block.every is for votes; with block.share=union every query chooses for itself")


@dataclass(frozen=True, kw_only=True)
class BlockGateOptions(GateOptions):
    """How to train thresholds: as in LATTE, without soft gates, and by default without a gradient into the scores."""

    into_scores: bool = False

    def __post_init__(self) -> None:
        if self.mode == "soft":
            raise ValueError("gate.mode=soft weighs every key, and a block computes kept keys only: set ste or hard")
        super().__post_init__()
