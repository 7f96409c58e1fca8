"""SMYRF: each query attends to the keys of its cluster, in several rounds of balanced hashing (arXiv 2010.05315).

Keeps      the keys that share a cluster with the query in at least one round. Clusters hold about `cluster` keys; sizes
           differ by at most one. Tokens are first transformed so that near vectors have a large q.k, then hashed by a
           random direction, sorted by hash value and cut into equal parts.
Costs      rounds (n + m) (D + 2) MACs for the hashes and D + Dv for each meeting of a query and a key in a cluster.
           With m keys that is at most rounds * cluster / m of dense attention. A pair that meets twice counts as two
           meetings and one kept pair. Sorting is not counted. Causal self attention has about
           cluster (1 + rounds * log2(m / cluster) / 2) / 2 meetings a query; the block of a query is computed and
           counted once, not in every round. A tail adds D + Dv for each token and each query.
Trains     nothing of its own; gradients are exact with the clusters held constant. The cost has no gradient, so no
           budget can train it: you set `cluster` and `rounds`. With `tail=mean` the factor of each head's tail.
Estimates  nothing without bias: dropped keys have no weight, or with `tail=mean` that of their mean score, as one more
           key in the merge. Dropout acts on meetings and leaves the tail as it is. In the published rule
           (`dedup=none`) a key that meets a query in two rounds counts twice. `dedup=count` divides by the number of
           meetings, which gives the softmax over the union and tends to dense attention with more rounds. Clusters need
           the structure of trained networks; on random q and k they capture hardly more mass than random clusters.
Patterns   all four. Noncausal self and cross attention are as published. They rank queries together, so hide padding
           among the queries too. In causal cross attention ranks would reveal later queries; keys alone set the
           boundaries, and each query is placed by its own hash value. Causal self attention is ours: dense in blocks of
           `cluster` tokens; earlier tokens form segments of 1, 2, 4, ... blocks, selected by the binary digits of the
           query's block. In each segment a query meets one cluster of half as many keys, found as in causal cross
           attention. A block has the weight of `rounds` meetings.
Differs    from the official code: any number of tokens; padding in every example (the official mask is repeated in the
           wrong order if batch and heads both exceed 1, and norms include padding); clusters are fixed in evaluation;
           hashes are fp32. The published r and b cancel there; here `quantise` gives them an effect.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend
from thresher.attention.contract import Attended, Call, Cost, Pattern
from thresher.attention.dense import compute_dense_attention
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import check_choice, check_flags, check_integer, check_number
from thresher.attention.prepared import Prepared
from thresher.attention.shared.tail import TailKind, build_tail, count_tail_cost
from thresher.attention.shared.visibility import refuse_unknown_order
from thresher.attention.smyrf.causal import cluster_causal_tokens
from thresher.attention.smyrf.clusters import Clusters, Directions, Rank, cluster_tokens, hash_tokens
from thresher.attention.smyrf.layout import compute_ranks, find_unplaced, gather_slots
from thresher.attention.smyrf.tail import find_dropped_keys, sum_met_keys
from thresher.attention.smyrf.tiles import Tiles, attend_in_tiles, find_tile_keys, find_tile_queries

Dedup = Literal["none", "count"]
Resample = Literal["forward", "never"]


class Smyrf(Mechanism):
    """Softmax attention inside balanced clusters of queries and keys.

    Args:
        cluster: Largest number of keys in a cluster; with no more keys than that, attention is dense. In causal self
            attention, tokens in a block; clusters of earlier tokens hold half as many keys.
        rounds: Number of independent clusterings, merged by log-sum-exp.
        dedup: "none" counts a key once for each round in which a query meets it, as published; "count" once in all.
        tail: "mean" gives dropped keys the weight of their mean score, "none" no weight; see `shared/tail.py`.
        quantise: Round hash values down to multiples of `width`, as in textbooks; equal values sort by position.
        width: Width of the hash buckets of `quantise`.
        resample: Draw new hashes at each "forward" in training, or "never". Evaluation uses those in the state dict.
        backend: "reference" is PyTorch; "cpu" is the kernel and raises an error where the kernel cannot compute a
            call; "auto" is the kernel where it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    stochastic = True
    redrawn = frozenset({"directions", "shifts"})
    ranks_queries = True
    pools_tokens = True
    slides = False
    dense_limit = {"cluster": 10_000}
    precise = {"rounds": 16, "dedup": "count"}

    directions: Tensor
    shifts: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        cluster: int = 4,
        rounds: int = 2,
        dedup: Dedup = "none",
        tail: TailKind = "none",
        quantise: bool = False,
        width: float = 4.0,
        resample: Resample = "forward",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern, backend)
        check_integer("cluster", cluster, 1)
        check_integer("rounds", rounds, 1, 255)
        check_number("width", width, above=0.0)
        check_flags(quantise=quantise)
        for name, got, choices in (("dedup", dedup, Dedup), ("resample", resample, Resample)):
            check_choice(name, got, get_args(choices))
        self.cluster, self.rounds, self.dedup, self.tail = cluster, rounds, dedup, build_tail(tail, num_heads)
        self.quantise, self.width, self.resample = quantise, width, resample
        self.register_buffer("directions", torch.randn(rounds, head_dim + 2))
        self.register_buffer("shifts", torch.rand(rounds))

    def check(self, x: Prepared) -> None:
        if x.m > self.cluster:  # otherwise it is dense attention
            refuse_unknown_order(x.call, self.pattern, x.n, x.m, type(self).__name__)

    def reference(self, x: Prepared) -> Attended:
        if x.m <= self.cluster:
            return x.attend_densely()
        q, k, v = (tokens.flatten(0, 1) for tokens in (x.q, x.k, x.v))
        parts = self.assign(q, k, x)
        return self.finish(x, parts, *self.attend(q, k, v, x, parts))

    def finish(self, x: Prepared, parts: Sequence[Clusters], out: Tensor, meetings: Tensor, kept: Tensor) -> Attended:
        """Add the cost to outputs [g, n, dv], given the meetings and kept pairs of each group, [g]."""
        b, h, d = x.batch, x.heads, x.head_dim
        select = self.count_hashing(parts, d).view(b, h)
        if self.tail is not None:
            select = select + count_tail_cost(x, kept.view(b, h))
        cost = Cost(
            score=meetings.view(b, h) * d,
            value=meetings.view(b, h) * x.value_dim,
            select=select,
            dense=x.pairs * (d + x.value_dim),
            kept=kept.view(b, h),
            visible=x.pairs,
        )
        return Attended(out.view(b, h, x.n, x.value_dim), cost)

    @torch.no_grad()
    def assign(
        self, q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"], x: Prepared, rank: Rank = compute_ranks
    ) -> list[Clusters]:
        """Hash tokens and cut them into clusters."""
        g, n, m, call = x.batch * x.heads, x.n, x.m, x.call
        seen_q, seen_k = (
            None if seen is None else seen.expand(x.batch, x.heads, -1).flatten(0, 1)
            for seen in (x.seen_queries, x.seen_keys)
        )
        directions = Directions(self.directions, self.shifts, self.width if self.quantise else None)
        if self.training and self.resample == "forward":
            fresh = torch.randn_like(self.directions), torch.rand_like(self.shifts)
            directions = directions._replace(vectors=fresh[0], shifts=fresh[1])
        aligned = call.pairs is None and (call.keys is None or (n == m and call.queries is call.keys))
        if self.pattern is Pattern.CAUSAL_SELF:
            half, aligned = max(self.cluster // 2, 1), aligned and n == m
            slots = None if call.slots is None else call.slots.repeat_interleave(g // len(call.slots), 0)
            return cluster_causal_tokens(
                q, k, seen_q, seen_k, directions, half, slots=slots, aligned=aligned, rank=rank
            )
        independent_queries = self.pattern.causal
        hash_q, hash_k = hash_tokens(q, k, directions, independent_queries=independent_queries)
        return [
            cluster_tokens(
                hash_q,
                hash_k,
                seen_q,
                seen_k,
                self.cluster,
                independent_queries=independent_queries,
                aligned=aligned,
                rank=rank,
            )
        ]

    def count_hashing(self, parts: Sequence[Clusters], d: int) -> Float[Tensor, " g"]:
        """Count the MACs of hashing: d a token for the projection, and 2 a part to complete it, in each round."""
        total = torch.zeros(len(parts[0].queries.token), device=parts[0].queries.token.device)
        parts = [part for part in parts if not part.causal]
        if not parts:
            return total
        for layouts in ([part.queries for part in parts], [part.keys for part in parts]):
            placed = ~torch.stack([find_unplaced(layout) for layout in layouts])
            total += placed.any(0).sum(-1) * d + placed.sum((0, 2)) * 2
        return total * self.rounds

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Prepared, parts: Sequence[Clusters]
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Attend inside clusters and merge parts and rounds; return outputs, meetings and distinct pairs."""
        pairs, bias = x.call.pairs, x.call.bias
        tiles, extras, met = [], [], []
        meetings = repeats = torch.zeros(len(q), dtype=torch.long, device=q.device)
        for part in parts:
            tile, shown = self.build_tiles(part, x)
            token_q, token_k = find_tile_queries(tile), find_tile_keys(tile)
            every, twice = self.count_repeats(part, token_q, token_k, None if pairs is None else shown)
            extra = None if bias is None else self.gather_pairs(bias, token_q, token_k).to(q.dtype)
            if self.tail is not None:
                share = shown.to(q.dtype) if every is None else shown / every.clamp_min(1).to(q.dtype)
                met.append(sum_met_keys(x, tile, share, extra))
            if every is not None and self.dedup == "count":
                less = every.clamp_min(1).to(q.dtype).log().neg()
                extra = less if extra is None else extra + less
            tiles.append(tile)
            extras.append(extra)
            meetings = meetings + ((token_q < x.n) * shown.sum(-1)).sum((1, 2))
            repeats = repeats + twice
        dropped = None
        if self.tail is not None:
            dropped = find_dropped_keys(x, reduce(torch.add, met), self.tail.values().to(q.dtype))
        out = attend_in_tiles(q, k, v, tiles, extras, dropped, dropout=x.dropout, fused=pairs is None)
        return out, meetings.float(), (meetings - repeats).float()

    def build_tiles(self, part: Clusters, x: Prepared) -> tuple[Tiles, Bool[Tensor, "g tiles #s c"]]:
        """Build the tiles of a part; return them with the pairs that are visible in each."""
        times = self.rounds if part.causal and self.dedup == "none" else 1
        tile = Tiles(part.queries, part.keys, part.tile_cluster, None, None, part.number, times)
        token_q, token_k = find_tile_queries(tile), find_tile_keys(tile)
        shown = (token_k < x.m)[:, :, None]
        if part.causal:
            shown = shown & (token_k[:, :, None] <= token_q[..., None] + (x.m - x.n))
        if x.call.pairs is not None:
            real = (token_q < x.n)[..., None]
            shown = shown & real & self.gather_pairs(x.call.pairs, token_q, token_k)
        if x.call.pairs is not None or not part.filled:
            tile = tile._replace(shown=shown)
        if x.dropout:
            # Drawn by query; a draw by slot would depend on other queries. Rounds share it.
            drawn = torch.rand(x.batch * x.heads, x.n, token_k.shape[2], device=x.device)
            kept = gather_slots(drawn, token_q.flatten(1)).view(*token_q.shape, -1) >= x.dropout
            tile = tile._replace(drop=kept)
        return tile, shown

    def gather_pairs(
        self, x: Tensor, token_q: Int[Tensor, "g tiles s"], token_k: Int[Tensor, "g tiles c"]
    ) -> Shaped[Tensor, "g tiles s c"]:
        """Gather the entries of x [#b, #h, n, m] for the pairs of each tile."""
        (n, m), g = x.shape[-2:], len(token_q)
        flat = x.expand(g // self.num_heads, self.num_heads, n, m).reshape(g, n * m)
        index = token_q.clamp_max(n - 1)[..., None] * m + token_k.clamp_max(m - 1)[:, :, None]
        return flat.gather(-1, index.flatten(1)).view(index.shape)

    def count_repeats(
        self,
        clusters: Clusters,
        token_q: Int[Tensor, "g tiles s"],
        token_k: Int[Tensor, "g tiles c"],
        shown: Bool[Tensor, "g tiles #s c"] | None,
    ) -> tuple[Int[Tensor, "g tiles s c"] | None, Int[Tensor, " g"]]:
        """Count the meetings of each pair of a tile, if something divides by them, and all after the first."""
        rounds = len(clusters.query_cluster)
        counted = (self.dedup == "count" or self.tail is not None) and rounds > 1
        repeats = token_q.new_zeros(len(token_q))
        every: list[Tensor] = []
        # Empty slots have clusters of their own, so they meet nothing.
        ids_q, ids_k = (
            [
                F.pad(of, (0, 1), value=none).gather(-1, token.flatten(1)).view_as(token).chunk(rounds, 1)
                for of in of_round
            ]
            for of_round, token, none in ((clusters.query_cluster, token_q, -1), (clusters.key_cluster, token_k, -2))
        )
        for this in range(rounds):
            others = range(rounds if counted else this)
            meetings = [ids_q[other][this][..., None] == ids_k[other][this][:, :, None] for other in others]
            if this:
                before = reduce(torch.logical_or, meetings[:this])
                repeats += (before if shown is None else before & shown.chunk(rounds, 1)[this]).sum((1, 2, 3))
            if counted:
                every.append(torch.stack(meetings).sum(0))
        return (torch.cat(every, 1) if every else None), repeats

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Compute dense attention, the limit of larger clusters and, with `dedup=count`, of more rounds."""
        return compute_dense_attention(q, k, v, call, self.pattern)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cluster={self.cluster}, rounds={self.rounds}, dedup={self.dedup}"
