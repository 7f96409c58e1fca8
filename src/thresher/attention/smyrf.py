"""SMYRF: each query attends to the keys of its cluster, in several rounds of balanced hashing (arXiv 2010.05315).

Keeps      the keys that share a cluster with the query in at least one round. Clusters hold about `cluster` keys; sizes
           differ by one at most. Queries and keys are hashed by a random direction after transforms under which near
           means large q.k; tokens are sorted by hash value and cut into equal parts.
Costs      rounds (n + m) (D + 2) MACs for the hashes and D + Dv for each meeting of a query with a key: with m keys, a
           share rounds * cluster / m of dense attention at most. Meetings are counted each time, kept pairs once.
           Sorting is not counted. Causal self: about cluster (1 + rounds * log2(m / cluster) / 2) / 2 meetings for a
           query; its block, which is met in every round, is computed and counted once.
Trains     nothing of its own; gradients are exact with the clusters held constant. The cost has no gradient, so
           no budget can train it: `cluster` and `rounds` are set.
Estimates  nothing without bias: dropped keys count as if they had no weight. A key met in two rounds counts twice in
           the published rule (`dedup=none`); `dedup=count` divides by the number of meetings, which gives the
           softmax over the union and tends to dense attention as rounds grow. Trained networks have structure to be
           found; on random q and k the captured mass is hardly more than that of random clusters.
Patterns   all. Self and cross attention, noncausal, as published. Causal cross attention: the rank of a query among the
           others would betray later ones, so keys alone set the boundaries and each query is placed by its own value.
           In the others queries are ranked together: padding is to be hidden among the queries, too.
           Causal self attention (ours): dense in blocks of `cluster` tokens; the past is cut into segments of 1, 2, 4,
           ... blocks, as the binary digits of a query's block say, and in each the query meets one cluster of
           half as many keys, as in causal cross attention. Blocks weigh as if met in every round.
Differs    from the official code: any number of tokens, padding in every example (the official mask is repeated in
           the wrong order when batch and heads both exceed 1, and counts padding in the norms), clusters that
           are fixed in evaluation, hashes in fp32. The published r and b cancel there; `quantise` makes them act.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend, check_backend, served_by_kernel
from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.clusters import Clusters, Directions, Rank, cluster_tokens, hash_tokens
from thresher.attention.dense import attend_densely
from thresher.attention.functional import at_least_fp32, expand_heads
from thresher.attention.layout import rank_of, to_slots, unplaced
from thresher.attention.options import check_choice, check_flags, check_integer, check_number
from thresher.attention.past import cluster_past
from thresher.attention.tiles import Tiles, attend_in_tiles, keys_of, queries_of
from thresher.attention.visibility import hide_tokens, no_pairs, seen_tokens, visible_keys_of
from thresher.kernels import smyrf as kernel
from thresher.kernels.calling import readable

Dedup = Literal["none", "count"]
Resample = Literal["forward", "never"]


class Smyrf(Mechanism):
    """Softmax attention inside balanced clusters of queries and keys.

    Args:
        cluster: Keys in a cluster, at most; with as many keys or fewer it is dense attention. In causal self attention,
            tokens in a block; clusters of the past hold half as many keys.
        rounds: Independent clusterings, merged by their log-sum-exp.
        dedup: "none" counts a key once for each round in which it is met, as published; "count" once.
        quantise: Round hash values down to multiples of `width`, as textbooks do; ties go by position.
        width: Width of the hash buckets of `quantise`.
        resample: Draw new hashes at each "forward" in training, or "never". Evaluation uses those in the state dict.
        backend: "reference" is PyTorch; "cpu" the kernel, refused where it cannot compute a call; "auto" the kernel
            wherever it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    stochastic = True
    redrawn = frozenset({"directions", "shifts"})
    ranks_queries = True
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
        quantise: bool = False,
        width: float = 4.0,
        resample: Resample = "forward",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern)
        check_integer("cluster", cluster, 1)
        check_integer("rounds", rounds, 1, 255)
        check_number("width", width, above=0.0)
        check_flags(quantise=quantise)
        for name, got, choices in (("dedup", dedup, Dedup), ("resample", resample, Resample)):
            check_choice(name, got, get_args(choices))
        self.cluster, self.rounds, self.dedup = cluster, rounds, dedup
        check_backend(backend, "smyrf")
        self.quantise, self.width, self.resample, self.backend = quantise, width, resample, backend
        self.register_buffer("directions", torch.randn(rounds, head_dim + 2))
        self.register_buffer("shifts", torch.rand(rounds))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        (b, h, n, d), m, dv, dtype = q.shape, k.shape[2], v.shape[3], v.dtype
        if m <= self.cluster or no_pairs(q, k):
            return attend_densely(q, k, v, call, self.pattern, self.dropout if self.training else 0.0)
        k, v = expand_heads(k, h), expand_heads(v, h)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            by_kernel = served_by_kernel(self.backend, "smyrf", (q, k, v), self.obstacle(call))
            with torch.no_grad():
                rank = kernel.rank_of if by_kernel else rank_of
                parts = self.assign(at_least_fp32(q), at_least_fp32(k), call, rank)
            if by_kernel:
                q, k, v = readable(q, k, v)
                out, meetings, kept = self.attend_by_kernel(q, k, v, parts)
            else:
                q, k, v = (at_least_fp32(x) for x in (q, k, v))
                out, meetings, kept = self.attend(q, k, v, call, parts)
        pairs = visible_keys_of(call, self.pattern, n, m, q.device).sum(-1).float().expand(b, h)
        cost = Cost(
            score=meetings.view(b, h) * d,
            value=meetings.view(b, h) * dv,
            select=self.hashing(parts, d).view(b, h),
            dense=pairs * (d + dv),
            kept=kept.view(b, h),
            visible=pairs,
        )
        return Attended(out.view(b, h, n, dv).to(dtype), cost)

    def assign(
        self, q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"], call: Call, rank: Rank = rank_of
    ) -> list[Clusters]:
        """Hash tokens and cut them into clusters."""
        (g, n, _), m = q.shape, k.shape[1]
        seen_q, seen_k = (
            None if x is None else x.expand(g // self.num_heads, self.num_heads, -1).flatten(0, 1)
            for x in seen_tokens(call, self.pattern, n, m)
        )
        directions = Directions(self.directions, self.shifts, self.width if self.quantise else None)
        if self.training and self.resample == "forward":
            fresh = torch.randn_like(self.directions), torch.rand_like(self.shifts)
            directions = directions._replace(of_round=fresh[0], shifts=fresh[1])
        alike = call.pairs is None and (call.keys is None or (n == m and call.queries is call.keys))
        if self.pattern is Pattern.CAUSAL_SELF:
            half, alike = max(self.cluster // 2, 1), alike and n == m
            return cluster_past(q, k, seen_q, seen_k, directions, half, alike=alike, rank=rank)
        apart = self.pattern.causal
        hash_q, hash_k = hash_tokens(q, k, directions, apart=apart)
        return [cluster_tokens(hash_q, hash_k, seen_q, seen_k, self.cluster, apart=apart, alike=alike, rank=rank)]

    def hashing(self, parts: Sequence[Clusters], d: int) -> Float[Tensor, " g"]:
        """Count the MACs of hashing: a token is projected once in each round, and completed in each part."""
        total = torch.zeros(len(parts[0].queries.token), device=parts[0].queries.token.device)
        parts = [part for part in parts if not part.present]
        if not parts:
            return total
        for layouts in ([part.queries for part in parts], [part.keys for part in parts]):
            placed = ~torch.stack([unplaced(layout) for layout in layouts])
            total += placed.any(0).sum(-1) * d + placed.sum((0, 2)) * 2
        return total * self.rounds

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, parts: Sequence[Clusters]
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Attend inside clusters and merge parts and rounds; return outputs, meetings and distinct pairs met."""
        dropout = self.dropout if self.training else 0.0
        tiles, extras = [], []
        meetings = again = torch.zeros(len(q), dtype=torch.long, device=q.device)
        for part in parts:
            times = self.rounds if part.present and self.dedup == "none" else 1
            tile = Tiles(part.queries, part.keys, part.of_tile, None, None, part.number, times)
            token_q, token_k = queries_of(tile), keys_of(tile)
            real_q, real_k = token_q < q.shape[1], token_k < k.shape[1]
            shown = real_k[:, :, None]
            if part.present:
                shown = shown & (token_k[:, :, None] <= token_q[..., None] + (k.shape[1] - q.shape[1]))
            if call.pairs is not None:
                shown = shown & real_q[..., None] & self.pairwise(call.pairs, token_q, token_k)
            if call.pairs is not None or not part.full:
                tile = tile._replace(shown=shown)
            every, twice = self.repeats(part, token_q, token_k, None if call.pairs is None else shown)
            extra = None
            if call.bias is not None:
                extra = self.pairwise(call.bias, token_q, token_k).to(q.dtype)
            if every is not None:
                less = every.clamp_min(1).to(q.dtype).log().neg()
                extra = less if extra is None else extra + less
            if dropout:
                # Drawn by query, not by slot, where it would depend on the other queries; rounds share it.
                drawn = torch.rand(*q.shape[:2], token_k.shape[2], device=q.device)
                tile = tile._replace(drop=to_slots(drawn, token_q.flatten(1)).view(*token_q.shape, -1) >= dropout)
            tiles.append(tile)
            extras.append(extra)
            meetings = meetings + (real_q * shown.sum(-1)).sum((1, 2))
            again = again + twice
        out = attend_in_tiles(q, k, v, tiles, extras, dropout=dropout, fused=call.pairs is None)
        return out, meetings.float(), (meetings - again).float()

    def obstacle(self, call: Call) -> str | None:
        """Say why the kernel cannot compute a call."""
        if call.pairs is not None or call.bias is not None:
            return "it has no masks of pairs and no biases"
        if self.dropout and self.training:
            return "it has no dropout of attention weights"
        if self.dedup == "count" and self.rounds > 1:
            return "it does not divide by the number of meetings (dedup=count)"
        return None

    def attend_by_kernel(
        self, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Clusters]
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Do what `attend` does in the kernel."""
        found = []
        for part in parts:
            tiles = part.number if part.of_tile is None else part.of_tile.shape[1]
            token_q, token_k = (
                part.queries.token.unflatten(1, (tiles, -1)),
                part.keys.token.unflatten(1, (part.number, -1)),
            )
            of_tile = token_q.new_empty(0) if part.of_tile is None else part.of_tile
            times = self.rounds if part.present else 1
            found.append(kernel.Part(token_q, token_k, of_tile, part.of_query, part.of_key, part.present, times))
        out, meetings, again = kernel.attend(q, k, v, found, k.shape[1] - q.shape[1])
        return out, meetings.float(), (meetings - again).float()

    def pairwise(
        self, x: Tensor, token_q: Int[Tensor, "g tiles s"], token_k: Int[Tensor, "g tiles c"]
    ) -> Shaped[Tensor, "g tiles s c"]:
        """Take entries of x [#b, #h, n, m] for the pairs of each tile."""
        (n, m), g = x.shape[-2:], len(token_q)
        flat = x.expand(g // self.num_heads, self.num_heads, n, m).reshape(g, n * m)
        index = token_q.clamp_max(n - 1)[..., None] * m + token_k.clamp_max(m - 1)[:, :, None]
        return flat.gather(-1, index.flatten(1)).view(index.shape)

    def repeats(
        self,
        clusters: Clusters,
        token_q: Int[Tensor, "g tiles s"],
        token_k: Int[Tensor, "g tiles c"],
        shown: Bool[Tensor, "g tiles #s c"] | None,
    ) -> tuple[Int[Tensor, "g tiles s c"] | None, Int[Tensor, " g"]]:
        """Count the rounds in which each pair of a tile meets, if `dedup` wants it, and meetings after the first."""
        rounds = len(clusters.of_query)
        counted = self.dedup == "count" and rounds > 1
        again = token_q.new_zeros(len(token_q))
        every: list[Tensor] = []
        # Tokens that do not exist have clusters of their own, so that they never meet.
        ids_q, ids_k = (
            [
                F.pad(of, (0, 1), value=none).gather(-1, token.flatten(1)).view_as(token).chunk(rounds, 1)
                for of in of_round
            ]
            for of_round, token, none in ((clusters.of_query, token_q, -1), (clusters.of_key, token_k, -2))
        )
        for this in range(rounds):
            others = range(rounds if counted else this)
            met = [ids_q[other][this][..., None] == ids_k[other][this][:, :, None] for other in others]
            if this:
                before = reduce(torch.logical_or, met[:this])
                again += (before if shown is None else before & shown.chunk(rounds, 1)[this]).sum((1, 2, 3))
            if counted:
                every.append(torch.stack(met).sum(0))
        return (torch.cat(every, 1) if every else None), again

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Return dense attention: what larger clusters, and with `dedup=count` more rounds, tend to."""
        return attend_densely(q, k, v, call, self.pattern).out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cluster={self.cluster}, rounds={self.rounds}, dedup={self.dedup}"
