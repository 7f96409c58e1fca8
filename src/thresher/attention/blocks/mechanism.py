"""Blocks: consecutive queries share their kept keys, chosen by thresholds on the votes of the block.

Keeps      key j for all rows of block I iff max_l log v_Il - log v_Ij <= theta_h u_I, where the vote v_Ij is the mean
           probability that the voting rows of the block give to key j, by estimates of low precision as in LATTE. The
           threshold and its unit are those of LATTE, with log votes in place of scores; with one row in a block and
           `unit=nats` the rule is that of LATTE. With `block.share=union` each row chooses as in LATTE, outputs and
           all, and the block computes the union of what its rows chose. Tiles of `block.keys` keys are kept or dropped
           together: the vote for a tile is the sum of those for its keys, the probability that is lost without it; a
           row alone takes the sum of its own probabilities. `block.heads=shared` takes the mean vote of the heads that
           share keys. `block.rank=pooled` and `learned` rank tiles by pooled keys instead, and `block.top` keeps a
           number of tiles: with pooled keys and its own tile in each row that is MoBA (arXiv 2502.13189); `gate.py`
           describes the learned ranking.
Costs      in 8-bit MACs, as LATTE: an estimate for every pair of a voting row; for every computed pair the rest of its
           score and its value. A vote computes the kept pairs, a union those of all rows of the block. Pooled keys cost
           a score for each tile that a row (or, with a learned ranking by vote, a block) sees, and projections.
Trains     theta, one for each head, by the gate's gradient summed over the rows of a block. With `gate.into_scores` the
           gradient reaches the scores of the voting rows, too, each by its part of the vote. The learned ranking trains
           by an auxiliary loss.
Patterns   all four, by union where attention is causal: in a vote later queries of a block would decide about the keys
           of earlier ones. The rows of a vote depend on each other, so hide padding among the queries, too. A row pools
           those keys of a tile that it sees; tiles count from the first key, so a cache must not drop keys.
Emulates   pooled keys: the reference averages the scores of all pairs over tiles, biases among them, which equals the
           product with the mean key. Gathered keys and FlexAttention use that mean.
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
from thresher.attention.blocks.gate import LOSS, WEIGHT, TileGate, measure_gate_loss
from thresher.attention.blocks.options import BlockGateOptions, BlockOptions
from thresher.attention.blocks.tiles import (
    average_keys,
    average_tiles,
    choose_best,
    count_ranked_tiles,
    expand_tiles,
    find_own_tile,
    find_seen_tiles,
    split_tiles,
    sum_tiles,
)
from thresher.attention.contract import Attended, Call, Cost, Pattern
from thresher.attention.latte.mechanism import ESTIMATE, Latte, measure_spread
from thresher.attention.latte.options import EstimateOptions
from thresher.attention.options import build_group
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import zero_nonfinite
from thresher.attention.shared.functional import (
    attach_slope,
    fill_hidden,
    masked_softmax,
    promote_to_fp32,
    straight_through,
    weigh_gated,
)
from thresher.attention.shared.tail import TailKind
from thresher.attention.shared.thresholds import Differences, Gate, Unit
from thresher.attention.shared.visibility import count_pairs

BLOCK, GATE = BlockOptions(), BlockGateOptions()
LEAST_VOTE = 1e-30  # smaller ones count as much, so that logarithms stay finite


def take_logs(votes: Float[Tensor, "b h rows tiles"]) -> Float[Tensor, "b h rows tiles"]:
    """Take logarithms of votes, finite also where there is none."""
    return votes.clamp_min(LEAST_VOTE).log()


class Blocks(Latte):
    """Attention in which blocks of queries share the keys that they vote for.

    Args:
        block: Which queries share which keys and how they choose: `queries`, `keys`, `share`, `every`, `heads`, `rank`,
            `top`; see `BlockOptions`.
        estimate: How to estimate scores: `bits` (2, 4, 8 or "exact"), `split`, `scoring`; see `EstimateOptions`.
        gate: How to train thresholds: `mode` (ste or hard), `surrogate`, `tau`, `into_scores`; see `GateOptions`.
        unit: Unit of thresholds: "spread", the distance from the best log vote to the mean one, or "nats".
        threshold: Initial threshold in that unit, at least 0; of no effect with `block.top`.
        always_keep: Number of leading keys (class token, sink) that are kept where visible, with all of their tile.
        tail: "mean" gives dropped keys the weight of their mean score, "none" no weight; see `shared/tail.py`.
        backend: "reference" is PyTorch; "cpu" is the kernel for CPUs, "triton" those for CUDA, "gather" PyTorch that
            gathers the keys of a block, in memory linear in tokens, and "flex" is FlexAttention over tiles; each raises
            an error where it cannot compute a call; "auto" is the first that can, but never "flex".

    Raises:
        ValueError: A hyper-parameter outside its range, a vote in a causal pattern, or options that exclude each other.
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
        self.votes = self.block.share != "union" and not pattern.causal and self.block.rank != "pooled"
        self.ranks_queries = self.votes
        self.pools_tokens = self.votes or not self.estimate.is_exact or self.block.heads == "shared"
        self.slides, self.thresholds.decides = self.block.keys == 1, not self.block.top
        self.always_keep = -(-always_keep // self.block.keys) * self.block.keys
        self.tile_gate: TileGate | None = None
        if self.block.rank == "learned":
            self.tile_gate, self.auxiliary = TileGate(num_heads, head_dim), {LOSS: WEIGHT}
        self._check_together()

    def _check_together(self) -> None:
        """Check options of different groups together."""
        rank = self.block.rank
        if rank != "votes" and not self.estimate.is_exact:
            raise ValueError(f"block.rank={rank} has no estimates of scores: set estimate.bits=exact, scoring=exact")
        if rank == "learned" and self.gate.into_scores:
            raise ValueError("block.rank=learned learns from its auxiliary loss alone: set gate.into_scores=false")
        if self.block.top and self.gate.mode != "hard":
            raise ValueError("block.top keeps a number of tiles, so there is no threshold to train: set gate.mode=hard")
        if self.block.top and self.thresholds.base.isinf().any():
            raise ValueError("threshold=.inf keeps everything, and block.top a number of tiles: choose one")

    @property
    def rows_together(self) -> int:
        return self.block.queries if self.votes else 1

    @property
    def chooses_as_latte(self) -> bool:
        """Whether each row chooses single keys for itself."""
        return self.block.is_plain and not self.votes

    def attend(self, x: Prepared) -> Attended:
        attended = super().attend(x)
        if self.tile_gate is None or not self.needs_loss:
            return attended
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            shares = split_tiles(masked_softmax(self.score(x)[0], x.visible), self.block.keys).amax(-1)
            wanted = self.split_blocks(shares).amax(3) if self.votes else shares
        with torch.autocast(x.device.type, enabled=False):
            logits, seen = self.rank(x, self._score_by_gate(self.tile_gate, x))
            return attended._replace(losses={LOSS: measure_gate_loss(logits, wanted, seen)})

    @property
    def needs_loss(self) -> bool:
        """Whether a call has to compute the auxiliary loss of a learned ranking."""
        gate = self.tile_gate
        return gate is not None and torch.is_grad_enabled() and any(p.requires_grad for p in gate.parameters())

    def measure_differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        if self.block.top:
            raise ValueError(
                f"block.top={self.block.top} fixes how many tiles a row keeps, and leaves no threshold to calibrate: "
                "leave the budget out, or set block.top=0"
            )
        return super().measure_differences(q, k, call)

    def compare(self, x: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.chooses_as_latte:
            return super().compare(x)
        scores, estimate = self.score(x)
        chosen = straight_through(estimate, scores) if self.gate.into_scores else estimate
        logs, seen = self.rank(x, chosen if self.tile_gate is None else self._score_by_gate(self.tile_gate, x))
        difference, unit = self._compare_tiles(logs, seen, x)
        if self._may_hide_the_best(x):
            best = fill_hidden(estimate, x.visible, float("-inf")).argmax(-1, keepdim=True)
            difference = difference.scatter(-1, best // self.block.keys, float("-inf"))
        return scores, expand_tiles(difference, self.block.keys, x.m), None if self.unit == "nats" else unit

    def compare_to_choose(self, x: Prepared) -> Float[Tensor, "b h n m"]:
        """Compute the differences alone, by pooled keys without a score for each pair; for calls without such masks."""
        if self.block.rank == "votes":
            return self.compare(x)[1]
        q, k = promote_to_fp32(x.q), promote_to_fp32(x.k)
        if self.tile_gate is not None:
            q, k = self.tile_gate(q, k)
        ranked = self._pool_rows(*average_keys(q * x.scale, k, x, self.block.keys), x)
        return expand_tiles(self._compare_tiles(*ranked, x)[0], self.block.keys, x.m)

    def _may_hide_the_best(self, x: Prepared) -> bool:
        """Tell whether a mask of pairs could hide all that is kept from one of the rows that choose together."""
        shared = self.block.heads == "shared" and x.call.pairs is not None and x.call.pairs.shape[1] > 1
        return (self.votes and x.call.pairs is not None) or shared

    def rank(self, x: Prepared, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rank tiles [b, h, rows, tiles] by scores, for each block that votes or each row; return what it sees, too."""
        size = self.block.keys
        if self.block.rank == "votes":
            voters = self.find_voters(x)[..., None].expand(x.batch, x.heads, -1, -1).long()
            shares = sum_tiles(masked_softmax(scores, x.visible) * voters, size)
            votes = self._sum_voters(shares, x) / self._sum_voters(voters, x).clamp_min(1)
            logs = take_logs(votes)
            if x.visible is None:
                return logs, logs.new_ones((1, 1, 1, logs.shape[-1]), dtype=torch.bool)
            seen = find_seen_tiles(x, size).expand(x.batch, x.heads, x.n, -1).long()
            return logs, self._sum_voters(seen, x) > 0
        return self._pool_rows(*average_tiles(scores, x, size), x)

    def _pool_rows(self, means: Tensor, seen: Tensor, x: Prepared) -> tuple[Tensor, Tensor]:
        """Average over the rows of a block that see a tile, if they choose together."""
        if not self.votes:
            return means, seen
        means = means.masked_fill(~seen, 0)
        rows = self.sum_blocks(seen.expand(x.batch, x.heads, x.n, -1))
        return self.sum_blocks(means) / rows.clamp_min(1), rows > 0

    @staticmethod
    def _score_by_gate(gate: TileGate, x: Prepared) -> Float[Tensor, "b h n m"]:
        q, k = (promote_to_fp32(each) for each in (x.q, x.k))
        finite = (zero_nonfinite(each, trace) for each, trace in zip((q, k), x.score_traces, strict=True))
        q, k = gate(*finite)
        return q @ k.mT * x.scale

    def _sum_voters(self, rows: Shaped[Tensor, "b h n m"], x: Prepared) -> Shaped[Tensor, "b h rows m"]:
        """Sum over the rows that choose together: those of a block, of one head or of all that share keys."""
        rows = self.sum_blocks(rows) if self.votes else rows
        groups = x.grouped_k.shape[1]
        if self.block.heads == "own" or groups == x.heads:
            return rows
        return rows.unflatten(1, (groups, -1)).sum(2).repeat_interleave(x.heads // groups, 1)

    def _compare_tiles(self, logs: Tensor, seen: Tensor, x: Prepared) -> tuple[Tensor, Tensor]:
        """Compute the difference of each tile from the best one, and the unit of differences, for each row."""
        own = find_own_tile(x, self.block.keys) if self.block.rank == "pooled" else None
        difference, unit = self._compare_ranked(logs, seen, own)
        if self.votes:
            difference, unit = self.expand_blocks(difference, x.n), self.expand_blocks(unit, x.n)
        return difference, unit

    def _compare_ranked(self, logs: Tensor, seen: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do the same for each row of `logs`, which may be of a block."""
        with torch.no_grad():
            best = fill_hidden(logs, seen, float("-inf")).amax(-1, keepdim=True)
            best = best.masked_fill(best == float("-inf"), 0)
            unit = measure_spread(logs, best, seen) if self.unit == "spread" else torch.ones_like(best)
        if self.block.top:
            chosen = choose_best(logs, seen, own, self.block.top)
            return torch.full_like(logs, float("inf")).masked_fill(chosen, float("-inf")), unit
        # As in LATTE, the gradient is divided by the unit, but never enlarged.
        difference = attach_slope(((best - logs) / unit).detach(), (-1 / unit.clamp_min(1)).expand_as(logs), logs)
        if own is not None:
            difference = difference.scatter(-1, own.expand(*logs.shape[:3], 1), float("-inf"))
        return difference, unit

    def compare_votes(
        self, votes: Float[Tensor, "b h blocks m"], seen: Bool[Tensor, "#b #h #blocks m"]
    ) -> Float[Tensor, "b h blocks m"]:
        """Compute the difference of each key from the best one of its block.

        Args:
            votes: The mean probability that a block gives to each key.
            seen: The keys that any row of a block sees.
        """
        return self._compare_ranked(take_logs(votes), seen, None)[0]

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
        if not self.chooses_as_latte and self.tail is None:
            return weigh_gated(scores, self.open_gate(scores, difference, unit, gate, x))
        return super().weigh(scores, difference, unit, gate, x)

    def open_gate(self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, x: Prepared) -> Tensor:
        if self.chooses_as_latte:
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
        if self.block.rank != "votes":
            return cost._replace(
                score=kept * ratio * self.head_dim,
                value=cost.value * ratio,
                select=cost.select - x.pairs * macs + self._count_ranking(x),
            )
        silent = (x.visible_keys * ~self.find_voters(x)).sum(-1) if self.votes else torch.zeros_like(kept)
        return cost._replace(
            score=cost.score * ratio + unscored * macs,
            value=cost.value * ratio,
            select=cost.select - silent * macs,
        )

    def _count_ranking(self, x: Prepared) -> Float[Tensor, "b h"]:
        """Count the MACs of products of pooled queries and keys, and of their projections."""
        ranked, tokens = count_ranked_tiles(x, self.block.keys, self.rows_together)
        return ranked * self.head_dim + (0 if self.tile_gate is None else tokens * self.head_dim**2)
