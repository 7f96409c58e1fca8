"""Options of blocks: which queries share which keys, how they choose them, how thresholds are trained."""

from dataclasses import dataclass
from typing import Literal, get_args

from thresher.attention.latte.options import GateOptions
from thresher.attention.options import check_choice, check_integer

Share = Literal["auto", "vote", "union"]
Heads = Literal["own", "shared"]
Rank = Literal["votes", "pooled", "learned"]


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Which queries share which keys, and how they choose them.

    Attributes:
        queries: Consecutive queries in a block.
        keys: Consecutive keys in a tile, which are kept or dropped together; 1 lets each key count alone.
        share: "vote": the queries of a block choose together, where nothing is causal. "union": each query chooses for
            itself, and the block computes all that any of them chose. "auto": a vote where nothing is causal, but a
            union with `rank=pooled`.
        every: 1 lets each query of a block vote, 8 each eighth.
        heads: "own": each head chooses alone; "shared": heads that share keys vote together.
        rank: What tiles are ranked by: "votes", the probability that they receive; "pooled", the product of the query
            with the mean of their keys (MoBA); "learned", that product after trained projections (SeerAttention).
        top: Number of the best tiles that are kept; 0 keeps what a threshold keeps.
    """

    queries: int = 64
    keys: int = 1
    share: Share = "auto"
    every: int = 1
    heads: Heads = "own"
    rank: Rank = "votes"
    top: int = 0

    def __post_init__(self) -> None:
        check_integer("block.queries", self.queries, 1)
        check_integer("block.keys", self.keys, 1)
        check_choice("block.share", self.share, get_args(Share))
        check_integer("block.every", self.every, 1)
        check_choice("block.heads", self.heads, get_args(Heads))
        check_choice("block.rank", self.rank, get_args(Rank))
        check_integer("block.top", self.top, 0)
        if self.every > 1 and self.share == "union":
            raise ValueError("block.every is for votes; with block.share=union every query chooses for itself")
        if self.rank == "votes":
            return
        if self.keys == 1:
            raise ValueError(f"block.rank={self.rank} ranks tiles of several keys: set block.keys, such as 16 or 64")
        if self.every > 1 or self.heads == "shared":
            raise ValueError(f"block.every and block.heads=shared are for block.rank=votes, not {self.rank}")
        if self.rank == "pooled" and self.share == "vote":
            raise ValueError("with block.rank=pooled each query chooses its own tiles: set block.share=union, or auto")

    @property
    def is_plain(self) -> bool:
        """Whether each head chooses single keys by votes and a threshold, which is all that kernels do."""
        return self.keys == 1 and self.heads == "own" and self.rank == "votes" and not self.top

    def describe(self) -> str:
        """Describe what a kernel refuses, for its message."""
        changed = {"keys": self.keys > 1, "heads": self.heads != "own", "rank": self.rank != "votes", "top": self.top}
        return ", ".join(f"block.{name}={getattr(self, name)}" for name, differs in changed.items() if differs)


@dataclass(frozen=True, kw_only=True)
class BlockGateOptions(GateOptions):
    """How to train thresholds: as in LATTE, without soft gates, and by default without a gradient into the scores."""

    into_scores: bool = False

    def __post_init__(self) -> None:
        if self.mode == "soft":
            raise ValueError("gate.mode=soft weighs every key, and a block computes kept keys only: set ste or hard")
        super().__post_init__()
