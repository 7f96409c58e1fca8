"""YOSO: attention weights are collision probabilities of random hashes, sampled through tables (arXiv 2111.09714).

Keeps      every visible pair with weight E = (1 - arccos(q.k) / pi)^bits, for q and k of unit length. Sampling keeps
           the pairs that share a code in at least one of `hashes` hashes. The output of each head is divided by its own
           length, not by the sum of weights.
Costs      sampled: hashes * bits * D a token for Gaussian hashes (3 p log2 p a product for Hadamard ones, where p is D
           padded to a power of two), and Dv a token and hash to write and read tables; no scores. `conv` adds its
           width times Dv a query. `kept` is an upper bound: the collisions of a row, at most the keys that it sees.
           Expectation, pair masks and biases cost as much as dense. With fewer than `dense_below` keys PyTorch
           compares pairs, but the cost still counts tables.
Trains     nothing of its own. The cost has no gradient, so no budget can train it: you set `hashes` and `bits`.
Estimates  before the division by length, the sampled output is unbiased with respect to the expectation; after it, the
           output is biased and converges with more hashes. Neither estimates softmax attention, so a trained network
           needs further training. Gradients to values are exact for the sample. Gradients to queries and keys avoid
           dE/d(q.k), which is infinite at 1: `grad=bound` uses a lower bound, bits / 2 E, sampled with the same hashes;
           `grad=exact` uses dE/d(q.k) over all pairs, cut off near 1, quadratic in time but not in memory.
Patterns   all four. Hashes do not depend on data, so nothing leaks through them. In causal self attention tables are
           filled in the order of tokens.
Differs    from the official code and its ports: padding is masked (transformers turns both values of its mask into 1);
           queries keep their own codes (there the codes of keys overwrite them); evaluation divides by lengths too; a
           row without a collision is zero with zero gradient; hashes are fixed in evaluation. Tables cannot hold pair
           masks and score biases: with them collisions are counted pair by pair, and a bias multiplies weights by its
           exponential. There are no weights to drop, so dropout raises an error.
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.backends import Backend
from thresher.attention.contract import Attended, Call, Cost, Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import build_group, check_choice, check_flags, check_integer
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import LEAST_LENGTH, fill_hidden, normalize_vectors, promote_to_fp32
from thresher.attention.shared.visibility import take_own_rows
from thresher.attention.yoso.gradients import Grad, TableAttention, Tables, WithSlopes
from thresher.attention.yoso.hashing import (
    Pack,
    collision_probability,
    collision_slope,
    compute_gaussian_codes,
    compute_hadamard_codes,
)
from thresher.attention.yoso.options import HashOptions
from thresher.attention.yoso.tables import count_collisions

HASH = HashOptions()


class Yoso(Mechanism):
    """Attention whose weights are collision probabilities.

    Args:
        hashes: Number of hashes to average over.
        hash: How tokens are hashed: `kind`, `bits`, `resample`; see `HashOptions`.
        expectation: Use exact collision probabilities instead of samples, in quadratic time and memory.
        grad: Gradient to queries and keys: "bound" or "exact".
        conv: Odd width of a depthwise convolution of the values, one filter for each head, added to the output; 0
            disables it. Self attention only.
        dense_below: With fewer keys, PyTorch compares pairs instead of using tables: the same result, faster on short
            sequences. The kernel always uses tables.
        backend: "reference" is PyTorch; "cpu" is the kernel and raises an error where the kernel cannot compute a
            call; "auto" is the kernel where it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    stochastic = True
    redrawn = frozenset({"draws"})
    drops_weights = False
    precise = {"hashes": 512}

    draws: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        hashes: int = 32,
        hash: HashOptions | Mapping[str, Any] = HASH,
        expectation: bool = False,
        grad: Grad = "bound",
        conv: int = 0,
        dense_below: int = 1024,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern, backend)
        for name, number, low in (("hashes", hashes, 1), ("conv", conv, 0), ("dense_below", dense_below, 0)):
            check_integer(name, number, low)
        check_flags(expectation=expectation)
        check_choice("grad", grad, get_args(Grad))
        self.hash = build_group("hash", HashOptions, hash)
        self.hash.check_fits(head_dim)
        if conv and (conv % 2 == 0 or pattern.cross):
            raise ValueError(f"conv must be 0 or an odd width, and needs self attention; got {conv}")
        self.hashes, self.sampled, self.grad, self.dense_below = hashes, not expectation, grad, dense_below
        self.filters = nn.Parameter(torch.randn(num_heads, 1, conv) / conv**0.5) if conv else None
        self.register_buffer("draws", self.hash.draw(hashes, head_dim))

    def check(self, x: Prepared) -> None:
        if self.filters is not None and x.call.pairs is not None:
            raise ValueError("the convolution cannot follow a mask of pairs; set conv=0")

    def reference(self, x: Prepared) -> Attended:
        codes = self.compute_codes(x) if self.sampled else None
        if codes is None or x.m < self.dense_below or x.call.pairs is not None or x.call.bias is not None:
            return self.finish(x, *self.sum_pair_by_pair(x, codes))
        return self.finish(x, *self.sum_through_tables(x, codes, by_kernel=False))

    def sum_through_tables(
        self, x: Prepared, codes: tuple[Tensor, Tensor], *, by_kernel: bool
    ) -> tuple[Tensor, Tensor]:
        """Sum values and count collisions of each row through tables, in time linear in the number of keys."""
        q, k, v = (promote_to_fp32(tokens).flatten(0, 1) for tokens in (x.q, x.k, x.v))
        seen = None if x.seen_keys is None else x.seen_keys.expand(x.batch, x.heads, x.m).flatten(0, 1)
        tables = Tables(2**self.hash.bits, self.grad, x.causal_shift, by_kernel)
        mean, collisions = TableAttention.apply(q, k, v, *codes, seen, tables)
        return mean, collisions

    def finish(self, x: Prepared, mean: Float[Tensor, "g n dv"], collisions: Float[Tensor, "g n"]) -> Attended:
        """Divide the sum of each row by its length, add the convolution, and count the cost."""
        mean = mean.view(x.batch, x.heads, x.n, mean.shape[-1])
        length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
        # A row without a collision is zero and has no gradient.
        share = (1 / length.clamp_min(LEAST_LENGTH)).masked_fill(length == 0, 0)
        out = mean * share if mean.requires_grad else mean.mul_(share)  # in place: only this call holds the sums
        if self.filters is not None:
            out = out + self.convolve(promote_to_fp32(x.v), x)
        return Attended(out, self.count_cost(collisions.view(x.batch, x.heads, x.n), x))

    def compute_codes(self, x: Prepared, pack: Pack | None = None) -> tuple[Int[Tensor, "m g n"], Int[Tensor, "m g k"]]:
        """Compute the codes of queries and keys with the same hashes."""
        with torch.no_grad():
            draws = self.draws
            if self.training and self.hash.resample == "forward":
                draws = torch.randn_like(draws)
                draws = draws if self.hash.kind == "gaussian" else draws.sign()
            q, k = (promote_to_fp32(tokens).flatten(0, 1) for tokens in (x.q, x.k))
            if self.hash.kind == "gaussian":
                return compute_gaussian_codes(q, draws, pack), compute_gaussian_codes(k, draws, pack)
            code_q, code_k = (
                compute_hadamard_codes(tokens, draws, self.hashes, self.hash.bits, pack) for tokens in (q, k)
            )
            return code_q, code_k

    def sum_pair_by_pair(
        self, x: Prepared, codes: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, "g n"]]:
        """Sum values with a weight for each pair and count the collisions of each row."""
        q, k, v = (tokens.flatten(0, 1) for tokens in (x.q, x.k, x.v))
        bits, visible, split = self.hash.bits, x.visible, (x.batch, x.heads)
        cosine = (normalize_vectors(q) @ normalize_vectors(k).mT).clamp(-1, 1)
        if codes is None:
            value = collision_probability(cosine.detach(), bits)
        else:
            value = count_collisions(*codes, q.dtype) / self.hashes
        slope = value * (bits / 2) if self.grad == "bound" else collision_slope(cosine.detach(), bits)
        shown = value if visible is None else value.unflatten(0, split).masked_fill(~visible, 0).flatten(0, 1)
        weights = WithSlopes.apply(cosine, value, slope).unflatten(0, split)
        if x.call.bias is not None:
            bias = fill_hidden(x.call.bias.to(weights.dtype), visible, float("-inf"))
            highest = bias.detach().amax(-1, keepdim=True)
            # A common factor of a row cancels later; this one keeps exp in range.
            weights = weights * (bias - highest.masked_fill(highest == float("-inf"), 0)).exp()
        if visible is not None:
            weights = weights.masked_fill(~visible, 0)
        return weights.flatten(0, 1) @ v, shown.sum(-1) * self.hashes

    def convolve(self, v: Float[Tensor, "b h m dv"], x: Prepared) -> Float[Tensor, "b h n dv"]:
        """Convolve the values depthwise; return the rows at the positions of the queries."""
        assert self.filters is not None
        width = self.filters.shape[-1]
        rows = v.transpose(2, 3).transpose(1, 2).flatten(0, 1)
        side = (width - 1, 0) if self.pattern.causal else (width // 2, width // 2)
        mixed = F.conv1d(F.pad(rows, side), self.filters.to(v.dtype), groups=self.num_heads)
        mixed = mixed.unflatten(0, (v.shape[0], v.shape[3])).transpose(1, 2).transpose(2, 3)
        return take_own_rows(mixed, x.call, x.n)

    def count_cost(self, collisions: Float[Tensor, "b h n"], x: Prepared) -> Cost:
        """Count the cost of hashing and tables for each token, or of pairs where no tables are used."""
        d, dv, pairs = self.head_dim, x.value_dim, x.pairs
        visible = x.visible_keys.expand(collisions.shape).float()
        dense = pairs * (d + dv)
        queries, keys = (
            torch.zeros_like(pairs) + (size if seen is None else seen.sum(-1))
            for seen, size in ((x.seen_queries, x.n), (x.seen_keys, x.m))
        )
        mixed = 0 if self.filters is None else queries * (self.filters.shape[-1] * dv)
        if not self.sampled:
            return Cost(pairs * d, pairs * dv + mixed, pairs * 0, dense, pairs, pairs)
        tokens = queries + keys
        by_tables = x.call.pairs is None and x.call.bias is None
        return Cost(
            score=pairs * 0 if by_tables else pairs * d,
            value=(tokens * (self.hashes * dv) if by_tables else pairs * dv) + mixed,
            select=tokens * self.hash.count_macs_per_token(self.hashes, d),
            dense=dense,
            kept=torch.minimum(collisions.round().float(), visible).sum(-1),
            visible=pairs,
        )

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Compute YOSO-E: the output with collision probabilities in place of collisions."""
        sampled, self.sampled = self.sampled, False
        try:
            out: Tensor = self(q, k, v, call).out
            return out
        finally:
            self.sampled = sampled

    def extra_repr(self) -> str:
        kind = f"hashes={self.hashes}" if self.sampled else "expectation"
        return f"{super().extra_repr()}, {kind}, bits={self.hash.bits}, grad={self.grad}, hash={self.hash.kind}"
