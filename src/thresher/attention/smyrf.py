"""SMYRF: each query attends to the keys of its cluster, in several rounds of balanced hashing (arXiv 2010.05315).

Keeps      the keys that share a cluster with the query in at least one round. Clusters hold about `cluster` keys; sizes
           differ by one at most. Queries and keys are hashed by a random direction after transforms under which near
           means large q.k; tokens are sorted by hash value and cut into equal parts.
Costs      rounds (n + m) (D + 2) MACs for the hashes and D + Dv for each meeting of a query with a key: with m keys, a
           share rounds * cluster / m of dense attention at most. Meetings are counted each time, kept pairs once.
           Sorting is not counted.
Trains     nothing of its own; gradients are exact with the clusters held constant. The cost has no gradient, so
           no budget can train it: `cluster` and `rounds` are set.
Estimates  nothing without bias: dropped keys count as if they had no weight. A key met in two rounds counts twice in
           the published rule (`dedup=none`); `dedup=count` divides by the number of meetings, which gives the
           softmax over the union and tends to dense attention as rounds grow. Trained networks have structure to be
           found; on random q and k the captured mass is hardly more than that of random clusters.
Patterns   self and cross attention, noncausal, as published. Causal cross attention: the rank of a query among the
           others would betray later ones, so keys alone set the boundaries and each query is placed by its own value.
           In the others queries are ranked together: padding is to be hidden among the queries, too.
           Causal self attention is refused: there the boundaries would have to ignore later keys, too.
Differs    from the official code: any number of tokens, padding in every example (the official mask is repeated in
           the wrong order when batch and heads both exceed 1, and counts padding in the norms), clusters that
           are fixed in evaluation, hashes in fp32. The published r and b cancel there; `quantise` makes them act.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern, check_choice
from thresher.attention.clusters import Clusters, place, tiles
from thresher.attention.dense import attend_densely
from thresher.attention.functional import at_least_fp32, expand_heads
from thresher.attention.layout import layout_of, rank_of, to_slots
from thresher.attention.tiles import MergedAttention
from thresher.attention.visibility import count_seen_tokens, hide_tokens, seen_tokens, visible_keys_of

Dedup = Literal["none", "count"]
Resample = Literal["forward", "never"]


class Smyrf(Mechanism):
    """Softmax attention inside balanced clusters of queries and keys.

    Args:
        cluster: Keys in a cluster, at most; with as many visible keys or fewer it is dense attention.
        rounds: Independent clusterings, merged by their log-sum-exp.
        dedup: "none" counts a key once for each round in which it is met, as published; "count" once.
        quantise: Round hash values down to multiples of `width`, as textbooks do; ties go by position.
        width: Width of the hash buckets of `quantise`.
        resample: Draw new hashes at each "forward" in training, or "never". Evaluation uses those in the state dict.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    supports = frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS})
    stochastic = True
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
    ) -> None:
        super().__init__(num_heads, head_dim, pattern)
        if cluster < 1 or not 1 <= rounds <= 255:
            raise ValueError(f"cluster must be at least 1 and rounds lie in 1 .. 255, got {cluster} and {rounds}")
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        for name, got, choices in (("dedup", dedup, Dedup), ("resample", resample, Resample)):
            check_choice(name, got, get_args(choices))
        self.cluster, self.rounds, self.dedup = cluster, rounds, dedup
        self.quantise, self.width, self.resample = quantise, width, resample
        self.register_buffer("directions", torch.randn(rounds, head_dim + 2))
        self.register_buffer("shifts", torch.rand(rounds))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        (b, h, n, d), m, dv = q.shape, k.shape[2], v.shape[3]
        if m <= self.cluster:
            return attend_densely(q, k, v, call, self.pattern, self.dropout if self.training else 0.0)
        k, v = expand_heads(k, h), expand_heads(v, h)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            wide_q, wide_k, wide_v = (at_least_fp32(x).flatten(0, 1) for x in (q, k, v))
            with torch.no_grad():
                clusters = self.assign(wide_q, wide_k, call, b)
            out, meetings, kept = self.attend(wide_q * d**-0.5, wide_k, wide_v, call, clusters)
        pairs = visible_keys_of(call, self.pattern, n, m, q.device).sum(-1).float().expand(b, h)
        queries, keys = count_seen_tokens(call, self.pattern, n, m, pairs)
        cost = Cost(
            score=meetings.view(b, h) * d,
            value=meetings.view(b, h) * dv,
            select=(queries + keys) * (self.rounds * (d + 2)),
            dense=pairs * (d + dv),
            kept=kept.view(b, h),
            visible=pairs,
        )
        return Attended(out.view(b, h, n, dv).to(v.dtype), cost)

    # Clusters

    def assign(self, q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"], call: Call, batch: int) -> Clusters:
        """Hash tokens and cut them into clusters; hidden tokens belong to none."""
        (g, n, _), m = q.shape, k.shape[1]
        seen_q, seen_k = (
            torch.ones(g, size, dtype=torch.bool, device=q.device)
            if x is None
            else x.expand(batch, self.num_heads, size).reshape(g, size)
            for x, size in zip(seen_tokens(call, self.pattern, n, m), (n, m), strict=True)
        )
        hash_q, hash_k = self.hashes(q, k)
        rank_k = rank_of(hash_k.masked_fill(~seen_k, float("inf")))
        count_k = seen_k.sum(-1, keepdim=True).clamp_min(1)
        clusters = -(-count_k // self.cluster)
        number = -(-m // self.cluster)
        of_key = (rank_k * clusters // count_k).masked_fill(~seen_k, number)
        in_cluster = rank_k + (-of_key * count_k) // clusters
        slots_k = number * self.cluster
        keys = layout_of((of_key * self.cluster + in_cluster).masked_fill(~seen_k, slots_k), slots_k)
        if self.pattern.causal:
            of_query = place(hash_q, hash_k.masked_fill(~seen_k, float("inf")), clusters, count_k, number)
        else:
            count_q = seen_q.sum(-1, keepdim=True).clamp_min(1)
            of_query = rank_of(hash_q.masked_fill(~seen_q, float("inf"))) * clusters // count_q
        of_query = of_query.masked_fill(~seen_q, number)
        same_tokens = not self.pattern.cross and n == m and call.pairs is None and call.queries is call.keys
        queries, of_tile = tiles(of_query, number, self.cluster, aligned=same_tokens)
        return Clusters(of_query, of_key, of_tile, queries, keys, number)

    def hashes(
        self, q: Float[Tensor, "g n d"], k: Float[Tensor, "g m d"]
    ) -> tuple[Float[Tensor, "r g n"], Float[Tensor, "r g m"]]:
        """Project transformed tokens onto random directions, one for each round.

        With Mq and Mk the largest norms and M^2 = Mq^2 + Mk^2, F(q) = [q, 0, sqrt(M^2 - |q|^2)] and
        G(k) = [k, sqrt(M^2 - |k|^2), 0] have equal norms and F.G = q.k. Causal: M = Mk, and q is scaled to that
        length, so that no query depends on another.
        """
        directions, shifts = self.directions, self.shifts
        if self.training and self.resample == "forward":
            directions, shifts = torch.randn_like(directions), torch.rand_like(shifts)
        directions = directions.to(q.dtype)
        square_q, square_k = q.square().sum(-1), k.square().sum(-1)
        largest = square_k.amax(-1, keepdim=True)
        if self.pattern.causal:
            q = F.normalize(q, dim=-1) * largest.sqrt()[..., None]
            square_q = largest
        else:
            largest = largest + square_q.amax(-1, keepdim=True)
        rest_q, rest_k = (largest - square_q).clamp_min(0).sqrt(), (largest - square_k).clamp_min(0).sqrt()
        main = directions[:, :-2].mT
        hash_q = (q @ main).permute(2, 0, 1) + rest_q * directions[:, -1, None, None]
        hash_k = (k @ main).permute(2, 0, 1) + rest_k * directions[:, -2, None, None]
        if self.quantise:
            shift = (shifts * self.width).to(q.dtype)[:, None, None]
            hash_q, hash_k = (((x + shift) / self.width).floor() for x in (hash_q, hash_k))
        # nan would sort behind the tokens that are hidden; it still reaches the scores.
        return hash_q.nan_to_num(), hash_k.nan_to_num()

    # Attention

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, clusters: Clusters
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Attend inside clusters and merge the rounds; return outputs, meetings and distinct pairs met."""
        tiles_q = self.in_tiles(to_slots(q, clusters.queries), clusters)
        tiles_k, tiles_v = (self.in_clusters(to_slots(x, clusters.keys), clusters) for x in (k, v))
        token_q = self.in_tiles(clusters.queries.token[..., None], clusters)
        token_k = self.in_clusters(clusters.keys.token[..., None], clusters).mT
        real_q, real_k = token_q < q.shape[1], token_k < k.shape[1]
        shown = real_k
        if call.pairs is not None:
            shown = real_q & real_k & self.pairwise(call.pairs, token_q, token_k, len(q))
        every, before = self.repeats(clusters, token_q, token_k)
        extra = None
        if call.bias is not None:
            extra = self.pairwise(call.bias, token_q, token_k, len(q)).to(q.dtype)
        if every is not None:
            less = every.clamp_min(1).to(q.dtype).log().neg()
            extra = less if extra is None else extra + less
        drop = None
        if self.training and self.dropout:
            # Drawn by query, not by slot, where it would depend on the other queries; rounds share it.
            drawn = torch.rand(*q.shape[:2], self.cluster, device=q.device)
            drop = self.in_tiles(to_slots(drawn, clusters.queries), clusters) >= self.dropout
        out = MergedAttention.apply(tiles_q, tiles_k, tiles_v, extra, shown, drop, self.dropout, clusters.queries)
        if call.pairs is None:
            meetings = (real_q.sum((-2, -1)) * real_k.sum((-2, -1))).sum((0, 2))
        else:
            meetings = shown.sum((0, 2, 3, 4))
            before = before & shown[1:]
        return out, meetings.float(), (meetings - before.sum((0, 2, 3, 4))).float()

    def in_tiles(self, slots: Tensor, clusters: Clusters) -> Tensor:
        tiles = clusters.number if clusters.of_tile is None else clusters.of_tile.shape[-1]
        return slots.unflatten(2, (tiles, -1))

    def in_clusters(self, slots: Tensor, clusters: Clusters) -> Tensor:
        """Bring keys [r, g, slots, d] to the tiles that attend to them, [r, g, tiles, cluster, d]."""
        blocks = slots.unflatten(2, (clusters.number, self.cluster))
        if clusters.of_tile is None:
            return blocks
        r, g, number = blocks.shape[:3]
        first = torch.arange(r * g, device=slots.device).view(r, g, 1) * number
        return blocks.flatten(0, 2)[(clusters.of_tile + first).flatten()].unflatten(0, (r, g, -1))

    def pairwise(self, x: Tensor, token_q: Tensor, token_k: Tensor, groups: int) -> Tensor:
        """Take entries of x [#b, #h, n, m] for the pairs of each tile."""
        n, m = x.shape[-2:]
        flat = x.expand(groups // self.num_heads, self.num_heads, n, m).reshape(groups, n * m)
        index = token_q.clamp_max(n - 1) * m + token_k.clamp_max(m - 1)
        taken = flat.expand(len(index), -1, -1).gather(-1, index.flatten(2))
        return taken.view(index.shape)

    def repeats(self, clusters: Clusters, token_q: Tensor, token_k: Tensor) -> tuple[Tensor | None, Tensor]:
        """Count the rounds in which each pair of a tile meets, if `dedup` wants it, and say which met before.

        The second result leaves out the first round, in which nothing can have met before.
        """
        shape = (*token_q.shape[:-1], token_k.shape[-1])
        every = torch.zeros(shape, dtype=torch.uint8, device=token_q.device) if self.dedup == "count" else None
        before = torch.zeros((self.rounds - 1, *shape[1:]), dtype=torch.bool, device=token_q.device)
        for other in range(self.rounds):
            first = 0 if every is not None else other + 1
            # Tokens that do not exist have clusters of their own, so that they never meet.
            ids_q, ids_k = (
                F.pad(of[other], (0, 1), value=none)
                .expand(self.rounds - first, -1, -1)
                .gather(-1, token[first:].flatten(2))
                .view_as(token[first:])
                for of, token, none in ((clusters.of_query, token_q, -1), (clusters.of_key, token_k, -2))
            )
            both = ids_q == ids_k
            before[other:] |= both[other + 1 - first :]
            if every is not None:
                every += both
        return every, before

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Return dense attention: what larger clusters, and with `dedup=count` more rounds, tend to."""
        return attend_densely(q, k, v, call, self.pattern).out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cluster={self.cluster}, rounds={self.rounds}, dedup={self.dedup}"
