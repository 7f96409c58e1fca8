"""YOSO: attention weights are collision probabilities of random hashes, sampled through tables (arXiv 2111.09714).

Keeps      every visible pair with weight E = (1 - arccos(q.k) / pi)^bits, q and k of unit length; sampled, the pairs
           that share a code in at least one of `hashes` hashes. The output of each head is divided by its own length,
           not by the sum of weights.
Costs      sampled: hashes * bits * D a token for Gaussian hashes (3 p log2 p a part for Hadamard ones, p the power of
           two that D is filled up to), and Dv a token and hash to write and read tables; no scores. `conv` adds its
           width times Dv a query. `kept` is an upper bound: collisions of a row, at most the keys that it sees.
           Expectation, pair masks and biases: as dense. With fewer than `dense_below` keys the tables are what is
           counted, though pairs are what is computed.
Trains     nothing of its own; the cost has no gradient, so no budget can train it: `hashes` and `bits` are set.
Estimates  before the division by its length, the sampled output has the mean of the expectation's; after it, it is
           biased and converges as hashes grow. Neither estimates softmax attention: a trained network must be
           trained on. Gradients to values are exact for the sample. Those to queries and keys replace dE/d(q.k), which
           is infinite at 1, by a lower bound, bits / 2 E, sampled with the same hashes (`grad=bound`), or use
           dE/d(q.k) over all pairs, quadratic in time, not in memory (`grad=exact`).
Patterns   all four. Hashes do not depend on data, so nothing leaks through them; in causal self attention tables are
           filled in the order of tokens.
Differs    from the official code and its ports: padding is masked (transformers turns both values of its mask into 1),
           queries keep their own codes (there they are overwritten by the keys'), lengths are divided out in
           evaluation too, a row that meets no key is zero with zero gradient, hashes are fixed in evaluation. Pair
           masks and score biases have no table form: with them the same collisions are counted pair by pair, and a
           bias multiplies by its exponential. There are no weights to drop, so dropout is refused.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.attention.backends import Backend, check_backend, served_by_kernel
from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.dense import attend_densely
from thresher.attention.functional import (
    LEAST_LENGTH,
    at_least_fp32,
    expand_heads,
    fill_hidden,
    gradient_to_vectors,
    unit_vectors,
)
from thresher.attention.hashing import MAX_BITS, Pack, gaussian_codes, hadamard_codes, hadamard_width
from thresher.attention.options import check_choice, check_flags, check_integer
from thresher.attention.tables import causal_collision_sums, collision_sums, collisions
from thresher.attention.visibility import (
    count_seen_tokens,
    hide_tokens,
    no_pairs,
    seen_tokens,
    visible_keys_of,
    visible_pairs,
)
from thresher.kernels import yoso as kernel

Grad = Literal["bound", "exact"]
Hash = Literal["gaussian", "hadamard"]
Resample = Literal["forward", "never"]
EDGE = 1e-6  # distance from +-1 at which the slope of the collision probability is cut off
COLUMNS = 512  # of a table in backward
BLOCK = 256  # tokens compared pair by pair in causal attention, and rows of `grad=exact` in memory at a time


class Yoso(Mechanism):
    """Attention whose weights are collision probabilities.

    Args:
        hashes: Hashes that are averaged.
        bits: Length of a code, at most 15; about log2 of the number of keys. More bits make weights more peaked.
        expectation: Use collision probabilities themselves, without sampling, in quadratic time and memory.
        grad: Gradient to queries and keys: "bound" or "exact".
        hash: Directions: "gaussian", independent, or "hadamard", faster and slightly biased.
        conv: Odd width of a depthwise convolution of the values, one filter for each head, added to the output; 0 is
            none. Self attention only.
        dense_below: With fewer keys, PyTorch counts collisions pair by pair: the same result, faster on short
            sequences. The kernel never does.
        resample: Draw new hashes at each "forward" in training, or "never". Evaluation uses those in the state dict.
        backend: "reference" is PyTorch; "cpu" the kernel, refused where it cannot compute a call; "auto" the kernel
            wherever it can.

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
        bits: int = 6,
        expectation: bool = False,
        grad: Grad = "bound",
        hash: Hash = "gaussian",
        conv: int = 0,
        dense_below: int = 1024,
        resample: Resample = "forward",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern)
        for name, number, low, high in (
            ("hashes", hashes, 1, None),
            ("bits", bits, 0, MAX_BITS),
            ("conv", conv, 0, None),
            ("dense_below", dense_below, 0, None),
        ):
            check_integer(name, number, low, high)
        check_flags(expectation=expectation)
        for name, got, choices in (("grad", grad, Grad), ("hash", hash, Hash), ("resample", resample, Resample)):
            check_choice(name, got, get_args(choices))
        if hash == "hadamard" and not 1 <= bits <= hadamard_width(head_dim):
            raise ValueError(
                f"a hadamard code has 1 .. {hadamard_width(head_dim)} bits at head_dim {head_dim}, got {bits}"
            )
        if conv and (conv % 2 == 0 or pattern.cross):
            raise ValueError(f"conv is 0 or an odd width, and for self attention only; got {conv}")
        self.hashes, self.bits, self.sampled, self.grad, self.hash = hashes, bits, not expectation, grad, hash
        check_backend(backend, "yoso")
        self.dense_below, self.resample, self.backend = dense_below, resample, backend
        self.filters = nn.Parameter(torch.randn(num_heads, 1, conv) / conv**0.5) if conv else None
        if hash == "gaussian":
            draws = torch.randn(hashes, bits, head_dim)
        else:
            width = hadamard_width(head_dim)
            draws = torch.randn(-(-hashes // (width // bits)), 3, width).sign()
        self.register_buffer("draws", draws)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        if no_pairs(q, k):
            return attend_densely(q, k, v, call, self.pattern)
        (b, h, n, _), m = q.shape, k.shape[2]
        k, v = expand_heads(k, h), expand_heads(v, h)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            wide_q, wide_k, wide_v = (at_least_fp32(x).flatten(0, 1) for x in (q, k, v))
            by_kernel = served_by_kernel(self.backend, "yoso", (wide_q, wide_k, wide_v), self.obstacle(call))
            codes = self.codes(wide_q, wide_k, kernel.pack if by_kernel else None) if self.sampled else None
            if (
                codes is None
                or (m < self.dense_below and not by_kernel)
                or call.pairs is not None
                or call.bias is not None
            ):
                mean, met = self.pair_by_pair(wide_q, wide_k, wide_v, call, codes, b)
            else:
                _, keys = seen_tokens(call, self.pattern, n, m)
                seen = None if keys is None else keys.expand(b, h, m).flatten(0, 1)
                way = _Way(2**self.bits, self.grad, self.causal_shift(n, m), by_kernel)
                mean, met = _TableAttention.apply(wide_q, wide_k, wide_v, *codes, seen, way)
            mean = mean.view(b, h, n, mean.shape[-1])
            seen, _ = seen_tokens(call, self.pattern, n, m)
            length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
            # A row that meets nothing is zero, and has no gradient.
            share = (1 / length.clamp_min(LEAST_LENGTH)).masked_fill(length == 0, 0)
            out = mean * share if mean.requires_grad else mean.mul_(share)  # the sums of this call, and nobody else's
            if self.filters is not None:
                out = out + self.convolved(at_least_fp32(v), n, call)
            if seen is not None:
                out = out.masked_fill(~seen[..., None], 0)
        return Attended(out.to(v.dtype), self.cost(met.view(b, h, n), call, m, v.shape[-1]))

    def obstacle(self, call: Call) -> str | None:
        """Say why the kernel cannot compute a call."""
        if not self.sampled:
            return "expectation=true has no tables"
        if call.pairs is not None or call.bias is not None:
            return "masks of pairs and biases have no table form"
        return None

    def codes(
        self, q: Tensor, k: Tensor, pack: Pack | None = None
    ) -> tuple[Int[Tensor, "m g n"], Int[Tensor, "m g k"]]:
        """Return the codes of queries and keys, by the same hashes."""
        with torch.no_grad():
            draws = self.draws
            if self.training and self.resample == "forward":
                draws = torch.randn_like(draws)
                draws = draws if self.hash == "gaussian" else draws.sign()
            if self.hash == "gaussian":
                return gaussian_codes(q, draws, pack), gaussian_codes(k, draws, pack)
            code_q, code_k = (hadamard_codes(x, draws, self.hashes, self.bits, pack) for x in (q, k))
            return code_q, code_k

    def causal_shift(self, n: int, m: int) -> int | None:
        return m - n if self.pattern.causal and not self.pattern.cross and n > 1 else None

    def pair_by_pair(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, codes: tuple[Tensor, Tensor] | None, batch: int
    ) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, "g n"]]:
        """Return the sum over keys, from a weight for each pair, and the number of collisions of each row."""
        cosine = (unit_vectors(q) @ unit_vectors(k).mT).clamp(-1, 1)
        if codes is None:
            value = collision_probability(cosine.detach(), self.bits)
        else:
            value = collisions(*codes, q.dtype) / self.hashes
        slope = value * (self.bits / 2) if self.grad == "bound" else collision_slope(cosine.detach(), self.bits)
        visible = visible_pairs(call, self.pattern, q.shape[1], k.shape[1], q.device)
        split = (batch, self.num_heads)
        shown = value if visible is None else value.unflatten(0, split).masked_fill(~visible, 0).flatten(0, 1)
        weights = _WithSlopes.apply(cosine, value, slope).unflatten(0, split)
        if call.bias is not None:
            bias = fill_hidden(call.bias.to(weights.dtype), visible, float("-inf"))
            highest = bias.detach().amax(-1, keepdim=True)
            # A factor common to a row is divided out later, so it may be any that keeps exp in range.
            weights = weights * (bias - highest.masked_fill(highest == float("-inf"), 0)).exp()
        if visible is not None:
            weights = weights.masked_fill(~visible, 0)
        return weights.flatten(0, 1) @ v, shown.sum(-1) * self.hashes

    def convolved(self, v: Float[Tensor, "b h m dv"], n: int, call: Call) -> Float[Tensor, "b h n dv"]:
        """Return the depthwise convolution of the values at the positions of the queries, the last n."""
        assert self.filters is not None
        if call.pairs is not None:
            raise ValueError("the convolution mixes neighbours whatever a mask of pairs says; set conv=0")
        width = self.filters.shape[-1]
        rows = v.transpose(2, 3).transpose(1, 2).flatten(0, 1)
        side = (width - 1, 0) if self.pattern.causal else (width // 2, width // 2)
        mixed = F.conv1d(F.pad(rows, side), self.filters.to(v.dtype), groups=self.num_heads)
        return mixed.unflatten(0, (v.shape[0], v.shape[3])).transpose(1, 2).transpose(2, 3)[:, :, -n:]

    def cost(self, met: Float[Tensor, "b h n"], call: Call, m: int, value_dim: int) -> Cost:
        (b, h, n), d = met.shape, self.head_dim
        visible = visible_keys_of(call, self.pattern, n, m, met.device).expand(b, h, n).float()
        pairs = visible.sum(-1)
        dense = pairs * (d + value_dim)
        queries, keys = count_seen_tokens(call, self.pattern, n, m, pairs)
        mixed = 0 if self.filters is None else queries * (self.filters.shape[-1] * value_dim)
        if not self.sampled:
            return Cost(pairs * d, pairs * value_dim + mixed, pairs * 0, dense, pairs, pairs)
        tokens = queries + keys
        hashing = self.hashes * self.bits * d
        if self.hash == "hadamard":
            width = self.draws.shape[-1]
            hashing = len(self.draws) * 3 * width * int(math.log2(width))
        by_tables = call.pairs is None and call.bias is None
        return Cost(
            score=pairs * 0 if by_tables else pairs * d,
            value=(tokens * (self.hashes * value_dim) if by_tables else pairs * value_dim) + mixed,
            select=tokens * hashing,
            dense=dense,
            kept=torch.minimum(met.round().float(), visible).sum(-1),
            visible=pairs,
        )

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Return YOSO-E: the output with collision probabilities in place of collisions."""
        sampled, self.sampled = self.sampled, False
        try:
            out: Tensor = self(q, k, v, call).out
            return out
        finally:
            self.sampled = sampled

    def extra_repr(self) -> str:
        kind = f"hashes={self.hashes}" if self.sampled else "expectation"
        return f"{super().extra_repr()}, {kind}, bits={self.bits}, grad={self.grad}, hash={self.hash}"


def collision_probability(cosine: Tensor, bits: int) -> Tensor:
    """Return (1 - arccos(x) / pi)^bits."""
    return (1 - cosine.arccos() / math.pi) ** bits


def collision_slope(cosine: Tensor, bits: int) -> Tensor:
    """Return the derivative of the collision probability, cut off where |x| > 1 - EDGE."""
    if bits == 0:
        return torch.zeros_like(cosine)
    x = cosine.clamp(EDGE - 1, 1 - EDGE)
    return bits * (1 - x.arccos() / math.pi) ** (bits - 1) / (math.pi * (1 - x * x).sqrt())


class _WithSlopes(torch.autograd.Function):
    """A weight for each pair, whose derivative by the cosine of the pair is given."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class _Way(NamedTuple):
    """How tables are used.

    Attributes:
        slots: Number of different codes.
        grad: Gradient to queries and keys.
        shift: Where causal, query i sees keys j <= i + shift.
        by_kernel: Whether a kernel does it.
    """

    slots: int
    grad: Grad
    shift: int | None
    by_kernel: bool


class _TableAttention(torch.autograd.Function):
    """The mean over hashes of the sums of colliding values, forward and backward through tables, and their number."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codes_q: Tensor,
        codes_k: Tensor,
        seen: Tensor | None,
        way: _Way,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, codes_q, codes_k, seen)
        ctx.way = way
        if way.by_kernel:
            sums, met = kernel.sums_of_keys(v, codes_q, codes_k, seen, way.slots, way.shift)
            sums.div_(len(codes_q))
        else:
            real = v.new_ones(v.shape[:2]) if seen is None else seen.to(v.dtype)
            sums = _read_keys(torch.cat([v, real[..., None]], -1), codes_q, codes_k, way)
            sums, met = sums[..., :-1] / len(codes_q), sums[..., -1]
        ctx.mark_non_differentiable(met)
        return sums, met

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        long_q, long_k, v, codes_q, codes_k, seen = ctx.saved_tensors
        q, k, way, share = unit_vectors(long_q), unit_vectors(long_k), ctx.way, 1 / len(codes_q)
        if way.by_kernel:
            grad_v = kernel.sums_of_queries(grad, codes_q, codes_k, way.slots, way.shift) * share
        else:
            grad_v = _read_queries(grad, codes_q, codes_k, way) * share
        if way.grad == "exact":
            grad_q, grad_k = _exact(q, k, v, grad, way.slots.bit_length() - 1, way.shift)
        elif way.by_kernel:
            slope = share * (way.slots.bit_length() - 1) / 2
            grad_q, grad_k = kernel.bound(q, k, v, grad, codes_q, codes_k, seen, way.slots, way.shift, slope)
        else:
            grad_q, grad_k = _bound(q, k, v, grad, codes_q, codes_k, way)
        grad_q, grad_k = gradient_to_vectors(long_q, q, grad_q), gradient_to_vectors(long_k, k, grad_k)
        return grad_q, grad_k, grad_v, None, None, None, None


def _bound(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, codes_q: Tensor, codes_k: Tensor, way: _Way
) -> tuple[Float[Tensor, "g n d"], Float[Tensor, "g m d"]]:
    """Return the gradients to queries and keys, feature by feature of the values."""
    grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
    for part in torch.arange(v.shape[-1], device=v.device).split(max(COLUMNS // q.shape[-1], 1)):
        g, u = grad[..., part, None], v[..., part, None]
        from_keys = _read_keys((u * k[..., None, :]).flatten(2), codes_q, codes_k, way).unflatten(-1, (len(part), -1))
        grad_q += (g * from_keys).sum(-2)
        from_queries = _read_queries((g * q[..., None, :]).flatten(2), codes_q, codes_k, way)
        grad_k += (u * from_queries.unflatten(-1, (len(part), -1))).sum(-2)
    slope = (way.slots.bit_length() - 1) / (2 * len(codes_q))
    return grad_q * slope, grad_k * slope


def _read_keys(x: Tensor, codes_q: Tensor, codes_k: Tensor, way: _Way) -> Tensor:
    if way.shift is None:
        return collision_sums(codes_q, codes_k, x, way.slots)
    return causal_collision_sums(codes_q, codes_k, x, way.slots, way.shift, BLOCK)


def _read_queries(x: Tensor, codes_q: Tensor, codes_k: Tensor, way: _Way) -> Tensor:
    """Sum over the queries that read a key; in causal attention these are the later ones, so time runs backwards."""
    if way.shift is None:
        return collision_sums(codes_k, codes_q, x, way.slots)
    turned = codes_k.flip(-1), codes_q.flip(-1), x.flip(1)
    return causal_collision_sums(*turned, way.slots, 0, BLOCK).flip(1)


def _exact(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bits: int, shift: int | None
) -> tuple[Float[Tensor, "g n d"], Float[Tensor, "g m d"]]:
    grad_q, grad_k = [], torch.zeros_like(k)
    for start in range(0, q.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        through = (grad[:, rows] @ v.mT) * collision_slope((q[:, rows] @ k.mT).clamp(-1, 1), bits)
        if shift is not None:
            through = through.tril(start + shift)
        grad_q.append(through @ k)
        grad_k += through.mT @ q[:, rows]
    return torch.cat(grad_q, 1), grad_k
