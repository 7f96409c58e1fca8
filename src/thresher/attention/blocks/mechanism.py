"""Blocks: consecutive queries share their kept keys, chosen by thresholds on the votes of the block.

Keeps      key j for all rows of block I iff max_l log v_Il - log v_Ij <= theta_h u_I, where the vote v_Ij is the mean
           probability that the voting rows of the block give to key j, by estimates of low precision as in LATTE. The
           threshold and its unit are those of LATTE, with log votes in place of scores; with one row in a block and
           `unit=nats` the rule is that of LATTE. With `block.share=union` each row chooses as in LATTE, outputs and
           all, and the block computes the union of what its rows chose.
Costs      in 8-bit MACs, as LATTE: an estimate for every pair of a voting row; for every computed pair the rest of its
           score and its value. A vote computes the kept pairs, a union those of all rows of the block.
Trains     theta, one for each head, by the gate's gradient summed over the rows of a block. With `gate.into_scores` the
           gradient reaches the scores of the voting rows, too, each by its part of the vote.
Patterns   all four, by union where attention is causal: in a vote later queries of a block would decide about the keys
           of earlier ones. The rows of a vote depend on each other, so hide padding among the queries, too.
Why        a block's keys can be gathered once, and the rest is a product of dense matrices, which is fast everywhere.
Ours       all of it: the vote on probabilities, which keep what few rows need much; the floor of votes; and that each
           row keeps its own best key where a mask of pairs could leave it without one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend
from thresher.attention.blocks.options import BlockGateOptions, BlockOptions
from thresher.attention.contract import Cost, Pattern
from thresher.attention.latte.mechanism import ESTIMATE, Latte, measure_spread
from thresher.attention.latte.options import EstimateOptions
from thresher.attention.options import build_group
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import (
    attach_slope,
    fill_hidden,
    masked_softmax,
    straight_through,
    weigh_gated,
)
from thresher.attention.shared.tail import TailKind
from thresher.attention.shared.thresholds import Gate, Unit
from thresher.attention.shared.visibility import count_pairs

BLOCK, GATE = BlockOptions(), BlockGateOptions()
LEAST_VOTE = 1e-30  # smaller ones count as much, so that logarithms stay finite


class Blocks(Latte):
    """Attention in which blocks of queries share the keys that they vote for.

    Args:
        block: How many queries share keys and how they choose: `queries`, `share`, `every`; see `BlockOptions`.
        estimate: How to estimate scores: `bits` (2, 4, 8 or "exact"), `split`, `scoring`; see `EstimateOptions`.
        gate: How to train thresholds: `mode` (ste or hard), `surrogate`, `tau`, `into_scores`; see `GateOptions`.
        unit: Unit of thresholds: "spread", the distance from the best log vote to the mean one, or "nats".
        threshold: Initial threshold in that unit, at least 0.
        always_keep: Number of leading keys (class token, sink) that are kept where visible.
        tail: "mean" gives dropped keys the weight of their mean score, "none" no weight; see `shared/tail.py`.
        backend: "reference" is PyTorch; "cpu" is the kernel, and "gather" PyTorch that gathers the keys of a block, in
            memory linear in tokens; both raise an error where they cannot compute a call; "auto" is the first that can.

    Raises:
        ValueError: A hyper-parameter outside its range, or a vote in a causal pattern.
    """

    selective = {"threshold": 0.3, "block": {"queries": 4}}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        block: BlockOptions | Mapping[str, Any] = BLOCK,
        estimate: EstimateOptions | Mapping[str, Any] = ESTIMATE,
        gate: BlockGateOptions | Mapping[str, Any] = GATE,
        unit: Unit = "spread",
        threshold: float = 6.9,
        always_keep: int = 0,
        tail: TailKind = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            num_heads,
            head_dim,
            pattern,
            estimate=estimate,
            gate=build_group("gate", BlockGateOptions, gate),
            unit=unit,
            threshold=threshold,
            always_keep=always_keep,
            tail=tail,
            backend=backend,
        )
        self.block = build_group("block", BlockOptions, block)
        if pattern.causal and (self.block.share == "vote" or self.block.every > 1):
            raise ValueError(
                f"in {pattern.name.lower()} attention later queries of a block would vote about the keys of earlier "
                "ones: set block.share=union, or auto, and block.every=1"
            )
        self.votes = self.block.share != "union" and not pattern.causal
        self.ranks_queries = self.votes
        self.pools_tokens = self.votes or not self.estimate.is_exact

    @property
    def rows_together(self) -> int:
        return self.block.queries if self.votes else 1

    def compare(self, x: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.votes:
            return super().compare(x)
        scores, estimate = self.score(x)
        chosen = straight_through(estimate, scores) if self.gate.into_scores else estimate
        voters = self.find_voters(x)[..., None]
        votes = self.sum_blocks(masked_softmax(chosen, x.visible) * voters) / self.sum_blocks(voters).clamp_min(1)
        logs = votes.clamp_min(LEAST_VOTE).log()
        seen = None if x.visible is None else self.sum_blocks(x.visible.expand(-1, -1, x.n, -1)) > 0
        with torch.no_grad():
            best = fill_hidden(logs, seen, float("-inf")).amax(-1, keepdim=True)
            best = best.masked_fill(best == float("-inf"), 0)
            unit = measure_spread(logs, best, seen) if self.unit == "spread" else torch.ones_like(best)
        # As in LATTE, the gradient is divided by the unit, but never enlarged.
        difference = attach_slope(((best - logs) / unit).detach(), (-1 / unit.clamp_min(1)).expand_as(logs), logs)
        difference = self.expand_blocks(difference, x.n)
        if x.call.pairs is not None:
            own = fill_hidden(estimate, x.visible, float("-inf")).argmax(-1, keepdim=True)
            difference = difference.scatter(-1, own, float("-inf"))
        return scores, difference, None if self.unit == "nats" else self.expand_blocks(unit, x.n)

    def find_voters(self, x: Prepared) -> Bool[Tensor, "#b #h n"]:
        """Find the rows that vote: of those of a block that see any key, each `every`-th, beginning with the first."""
        seen = x.seen_queries
        if seen is None:
            seen = torch.ones(1, 1, x.n, dtype=torch.bool, device=x.device)
        if self.block.every == 1:
            return seen
        blocks = self.split_blocks(seen[..., None]).squeeze(-1)
        first = (blocks.cumsum(-1) - 1) % self.block.every == 0
        return (first & blocks).flatten(-2)[..., : x.n]

    def split_blocks(self, rows: Shaped[Tensor, "b h n m"]) -> Shaped[Tensor, "b h blocks queries m"]:
        """Split rows into blocks; the last one is filled up with zeros."""
        missing = -rows.shape[2] % self.block.queries
        return F.pad(rows, (0, 0, 0, missing)).unflatten(2, (-1, self.block.queries))

    def sum_blocks(self, rows: Shaped[Tensor, "b h n m"]) -> Shaped[Tensor, "b h blocks m"]:
        """Sum over the rows of each block."""
        return self.split_blocks(rows).sum(3)

    def expand_blocks(self, blocks: Shaped[Tensor, "b h blocks m"], n: int) -> Shaped[Tensor, "b h n m"]:
        """Give each row what belongs to its block."""
        return blocks.repeat_interleave(self.block.queries, 2)[:, :, :n]

    def weigh(self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, x: Prepared) -> Tensor:
        if self.votes and self.tail is None:
            return weigh_gated(scores, self.open_gate(scores, difference, unit, gate, x))
        return super().weigh(scores, difference, unit, gate, x)

    def open_gate(self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, x: Prepared) -> Tensor:
        if not self.votes:
            return super().open_gate(scores, difference, unit, gate, x)
        opened = gate.keep.to(scores.dtype)
        if gate.slope is None:
            return opened
        opened = attach_slope(opened, gate.slope, gate.threshold)
        if self.gate.into_scores:
            opened = opened + attach_slope(torch.zeros_like(opened), -gate.slope, difference)
        return opened

    def charge(self, gate: Gate, x: Prepared) -> Cost:
        return self.count_block_cost(x, gate.kept, *self.count_block_pairs(gate, x))

    def count_block_pairs(self, gate: Gate, x: Prepared) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
        """Count the pairs that blocks compute, and the kept pairs of rows that do not vote."""
        kept = gate.kept.detach()
        if self.votes and self.block.every == 1:
            return kept, torch.zeros_like(kept)
        keep = gate.keep.expand(x.shape)
        if self.votes:
            return kept, count_pairs(keep & ~self.find_voters(x)[..., None], x.shape, x.device)
        chosen = self.expand_blocks(self.sum_blocks(keep) > 0, x.n)
        computed = count_pairs(chosen if x.visible is None else chosen & x.visible, x.shape, x.device)
        return computed, torch.zeros_like(computed)

    def count_block_cost(
        self,
        x: Prepared,
        kept: Float[Tensor, "b h"],
        computed: Float[Tensor, "b h"],
        unscored: Float[Tensor, "b h"],
    ) -> Cost:
        """Count an estimate for every pair of a voting row, and the rest for every pair that blocks compute.

        Args:
            x: The call.
            kept: Number of kept pairs, with the gate's gradient.
            computed: Number of visible pairs of rows and the keys of their block.
            unscored: Number of kept pairs of rows that do not vote, and so have no estimate.
        """
        cost, macs = self.count_cost(kept, x), self.head_dim * self.estimate.share
        ratio = computed / kept.detach().clamp_min(1)
        silent = (x.visible_keys * ~self.find_voters(x)).sum(-1) if self.votes else torch.zeros_like(kept)
        return cost._replace(
            score=cost.score * ratio + unscored * macs,
            value=cost.value * ratio,
            select=cost.select - silent * macs,
        )
