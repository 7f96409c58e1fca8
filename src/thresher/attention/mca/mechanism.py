"""MCA: values are encoded from sampled input features, more for tokens that get more attention (arXiv 2201.12854).

Keeps      every visible pair: scores, softmax and the weighted sum are exact. MCA samples the value projection x W.
           With v_j the largest attention weight of key j, it draws r_j = ceil((n v_j / alpha)^2) of the d input
           features, in proportion to the squared norms of the rows of W. With r_j >= d the value is exact.
Costs      attention as dense, so `compute` is 1; the projection gets cheaper. `measure_fractions`, which you call
           yourself, counts it: over valid keys, over padded length as the paper does, and over the whole attention
           layer, where the saving stays below a quarter by construction.
Trains     nothing of its own. Sample counts have no gradient, so no budget can train them: you set `alpha`.
Estimates  the output without bias, given the inputs; with `grad=sampled` also the gradients, given the output's. A
           nonlinearity adds bias to both. `grad=exact` uses the gradient of exact values: less noise, more bias.
Patterns   noncausal. Counts come from the attention weights of *all* queries, so an early row learns about later ones.
           MCA therefore refuses causal patterns unless you set `allow_noncausal_budget`. Hide padding among the
           queries too; otherwise it raises counts.
Emulates   `path=dense` in PyTorch multiplies by a matrix of sample weights. It costs more than dense attention and
           serves to study accuracy. The CPU kernel computes the same result from the drawn features alone.
           `path=gather` does so in PyTorch, in buckets of similar counts. It needs one sequence of draws for all tokens
           of a head (`sampling.draws=shared`); a token uses its first r_j. It synchronises with the device once a
           bucket. Fixed draws, as in evaluation, use a generator, which breaks the graph of torch.compile.
Differs    from the official code: probabilities run along the input axis of W (there along the output axis); counts are
           rounded up (there down, which drops tokens and adds bias); n counts valid keys; padded queries do not raise
           counts; batches of any size and W of any shape work. `reproduce_paper` restores n = padded length and
           rounding down.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thresher.attention.backends import Backend
from thresher.attention.contract import Attended, Call, Pattern, ValueSource
from thresher.attention.dense import compute_dense_attention
from thresher.attention.mca.options import SamplingOptions
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import build_group, check_choice, check_flags, check_number
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import trace_vectors, zero_nonfinite
from thresher.attention.shared.functional import expand_heads, masked_softmax, promote_to_fp32

Grad = Literal["sampled", "exact"]
Path = Literal["dense", "gather"]
SAMPLING = SamplingOptions()


class Fractions(NamedTuple):
    """Value MACs as fractions of dense: over valid keys, over padded length, and over the whole layer."""

    valid: Float[Tensor, ""]
    padded: Float[Tensor, ""]
    layer: Float[Tensor, ""]


class Mca(Mechanism):
    """Softmax attention over values whose projection is sampled.

    Args:
        alpha: Error coefficient: larger is cheaper and noisier; 0 is exact.
        sampling: How features are drawn: `distribution`, `draws`, `resample`, `seed`; see `SamplingOptions`.
        grad: "sampled" or "exact".
        path: How PyTorch projects values: "dense" multiplies by all features and simulates the sample; "gather" reads
            the drawn features alone and needs shared multinomial draws.
        reproduce_paper: Count padded tokens in n and round counts down.
        allow_noncausal_budget: Permit causal patterns, in which counts depend on later queries.
        backend: What projects values: "reference" is PyTorch; "cpu" is the kernel and raises an error where the kernel
            cannot; "auto" is the kernel where it can. PyTorch always computes the attention weights.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    supports = frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS})
    stochastic = True
    ranks_queries = True
    needs_source = True
    pools_tokens = True
    dense_limit = {"alpha": 0.0}
    precise = {"alpha": 0.05}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        alpha: float = 1.0,
        sampling: SamplingOptions | Mapping[str, Any] = SAMPLING,
        grad: Grad = "sampled",
        path: Path = "dense",
        reproduce_paper: bool = False,
        allow_noncausal_budget: bool = False,
        backend: Backend = "auto",
    ) -> None:
        if allow_noncausal_budget:
            object.__setattr__(self, "supports", frozenset(Pattern))
        super().__init__(num_heads, head_dim, pattern, backend)
        check_number("alpha", alpha, least=0.0)
        check_flags(reproduce_paper=reproduce_paper, allow_noncausal_budget=allow_noncausal_budget)
        check_choice("grad", grad, get_args(Grad))
        check_choice("path", path, get_args(Path))
        self.sampling = build_group("sampling", SamplingOptions, sampling)
        if path == "gather" and (self.sampling.draws, self.sampling.distribution) != ("shared", "multinomial"):
            raise ValueError(
                "path=gather needs sampling.draws=shared and sampling.distribution=multinomial, "
                f"got {self.sampling.draws} and {self.sampling.distribution}"
            )
        self.alpha, self.grad, self.path, self.reproduce_paper = alpha, grad, path, reproduce_paper

    def check(self, x: Prepared) -> None:
        if self.alpha and x.call.source is None:
            raise ValueError("MCA samples the value projection and needs Call.source, which this call does not have")

    def reference(self, x: Prepared) -> Attended:
        return x.attend_densely() if self.alpha == 0 else self.attend(x, self.project)

    def attend(self, x: Prepared, project: Callable[[ValueSource, Tensor], Tensor]) -> Attended:
        """Attend with exact weights to the values that `project(source, counts)` returns."""
        groups = x.grouped_v.shape[1]
        source = self.prepare_source(x)
        source = source._replace(x=zero_nonfinite(source.x, trace_vectors(source.x)))
        weights = self.compute_weights(x)
        counts = self.count_samples(weights.detach(), x, source.x.shape[-1])
        values = project(source, counts)
        if source.bias is not None:
            values = values + source.bias.unflatten(0, (groups, 1, -1))
        seen = find_seen_by_group(x)
        if seen is not None:
            values = values.masked_fill(~seen[..., None], 0)
        weights = x.drop(weights)
        out = weights @ expand_heads(values, x.heads)
        if self.grad == "exact":
            exact = weights @ promote_to_fp32(x.v)
            out = exact + (out - exact).detach()
        return x.attended(out)

    def prepare_source(self, x: Prepared) -> ValueSource:
        """Promote the source of the values to at least fp32 and zero the tokens that no head sees."""
        assert x.call.source is not None
        tokens, weight, bias = x.call.source
        tokens, seen = promote_to_fp32(tokens), find_seen_by_group(x)
        if seen is not None:
            tokens = tokens.masked_fill(~seen.any(1)[..., None], 0)
        return ValueSource(tokens, promote_to_fp32(weight), None if bias is None else promote_to_fp32(bias))

    def compute_weights(self, x: Prepared) -> Float[Tensor, "b h n m"]:
        """Compute the exact attention weights."""
        scores = promote_to_fp32(x.q) @ promote_to_fp32(x.k).mT * x.scale
        if x.call.bias is not None:
            scores = scores + x.call.bias
        return masked_softmax(scores, x.visible)

    def count_samples(self, weights: Float[Tensor, "b h n m"], x: Prepared, d: int) -> Float[Tensor, "b g m"]:
        """Count the samples of each key and value head, 0 to d; query heads that share a value take the maximum."""
        importance = weights.amax(2).unflatten(1, (x.grouped_v.shape[1], -1)).amax(2)
        seen = find_seen_by_group(x)
        length: Tensor | int = x.m
        if seen is not None and not self.reproduce_paper:
            length = seen.sum(-1, keepdim=True)
        wanted = (length * importance / max(self.alpha, torch.finfo(weights.dtype).tiny)).square().clamp_max(d)
        return wanted.floor() if self.reproduce_paper else wanted.ceil()

    def project(self, source: ValueSource, counts: Float[Tensor, "b g m"]) -> Float[Tensor, "b g m dv"]:
        """Project tokens to values without bias, each from `counts` sampled features."""
        weight = source.weight.unflatten(0, (counts.shape[1], -1))
        chances = compute_chances(weight.detach())
        if self.path == "gather":
            return self.project_gathered(source.x, weight, chances, counts)
        return (source.x[:, None] * self.sample(chances, counts, source.x.shape[-1])) @ weight.mT

    def sample(self, chances: Float[Tensor, "g d"], counts: Float[Tensor, "b g m"], d: int) -> Float[Tensor, "b g m d"]:
        """Draw features; return their counts divided by their expected counts, 1 where all features are used."""
        generator = self.build_generator(chances)
        if self.sampling.distribution == "poisson":
            # Poisson(r) draws arrive before time r with exponential gaps. This bound on their number is practically
            # never reached; it makes the use of random numbers independent of the counts of other tokens.
            order = self.draw_sequence(chances, counts, d + 20 + math.ceil(10 * d**0.5), generator)
            uniform = torch.rand(order.shape, dtype=chances.dtype, device=chances.device, generator=generator)
            used = (-(1 - uniform).log()).cumsum(-1) <= counts[..., None]
        else:
            order = self.draw_sequence(chances, counts, d, generator)
            used = torch.arange(d, device=order.device) < counts[..., None]
        drawn = torch.zeros(*counts.shape, d, dtype=chances.dtype, device=chances.device)
        drawn = drawn.scatter_add_(-1, order.expand(used.shape), used.to(drawn.dtype))
        expected = counts[..., None] * chances[:, None]
        share = drawn / expected.masked_fill(expected == 0, 1)
        return share.masked_fill((counts >= d)[..., None], 1)

    def draw_sequence(
        self, chances: Float[Tensor, "g d"], counts: Tensor, length: int, generator: torch.Generator | None
    ) -> Int[Tensor, "#b g #m length"]:
        """Draw features for each token, or one sequence of them for all tokens of a head."""
        uniform = self.draw_uniform(chances, counts, length, generator).permute(2, 1, 0, 3).contiguous()
        order = torch.searchsorted(chances.cumsum(-1), uniform.flatten(1), right=True)
        return order.clamp_max(chances.shape[-1] - 1).view(uniform.shape).transpose(0, 1)

    def draw_uniform(
        self, chances: Float[Tensor, "g d"], counts: Tensor, length: int, generator: torch.Generator | None
    ) -> Float[Tensor, "#m #b g length"]:
        """Draw the uniform numbers that select features.

        Fixed draws are the same for each example of a batch, so results do not depend on the batch size. Tokens are
        the first dimension: on a CPU, padding after a sequence then does not change the draws of its tokens.
        """
        b, groups, m = counts.shape
        if self.sampling.draws == "shared":
            b, m = 1, 1
        elif generator is not None:
            b = 1
        return torch.rand((m, b, groups, length), dtype=chances.dtype, device=chances.device, generator=generator)

    def project_gathered(
        self,
        x: Float[Tensor, "b m d"],
        weight: Float[Tensor, "g dv d"],
        chances: Float[Tensor, "g d"],
        counts: Float[Tensor, "b g m"],
    ) -> Float[Tensor, "b g m dv"]:
        """Project tokens in buckets: tokens with 2^(i-1) < r <= 2^i samples read 2^i columns, exact tokens read all."""
        d = x.shape[-1]
        order = self.draw_sequence(chances, counts, d, self.build_generator(chances))[0, :, 0]
        size = torch.where(counts >= d, d, 2 ** counts.clamp_min(1).log2().ceil()).clamp_max(d).long()
        heads = []
        for group in range(len(weight)):
            values = x.new_zeros(*x.shape[:2], weight.shape[1])
            for bucket in size[:, group].unique().tolist():
                chosen = (size[:, group] == bucket) & (counts[:, group] > 0)
                tokens, r = x[chosen], counts[:, group][chosen][:, None]
                drawn = order[group, :bucket]
                used = torch.arange(len(drawn), device=x.device) < r
                chance = chances[group, drawn]
                scale = (used / (r.clamp_min(1) * chance)).masked_fill(~used | (chance == 0), 0)
                some = (tokens[:, drawn] * scale) @ weight[group][:, drawn].mT
                exact = r >= d
                if bucket == d and exact.any():
                    some = torch.where(exact, tokens @ weight[group].mT, some)
                values = values.masked_scatter(chosen[..., None], some)
            heads.append(values)
        return torch.stack(heads, 1)

    def build_generator(self, like: Tensor) -> torch.Generator | None:
        """Build a generator that starts at `seed`; None, the global generator, where training draws anew."""
        if self.training and self.sampling.resample == "forward":
            return None
        return torch.Generator(like.device).manual_seed(self.sampling.seed)

    @torch.no_grad()
    def measure_fractions(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Fractions:
        """Measure the value MACs of a call as fractions of the dense ones (see the method card).

        The layer counts its four projections, scores and weighted sum: 4 n d^2 + 2 n^2 d, n the mean of valid keys.
        """
        x = self.prepare(q, k, v, call)
        self.check(x)
        d = self.prepare_source(x).x.shape[-1]
        with torch.autocast(q.device.type, enabled=False):
            weights = self.compute_weights(x)
        counts = (
            torch.full_like(weights[:, : v.shape[1], 0], d) if self.alpha == 0 else self.count_samples(weights, x, d)
        )
        seen = find_seen_by_group(x)
        counts = counts if seen is None else counts.masked_fill(~seen, 0)
        valid = torch.full_like(counts[..., 0], x.m) if seen is None else seen.sum(-1).expand_as(counts[..., 0])
        fraction = counts.sum() / (d * valid.sum())
        length = valid.double().mean()
        rest = 3 * length * d**2 + 2 * length**2 * d
        layer = (rest + fraction * length * d**2) / (rest + length * d**2)
        return Fractions(fraction, counts.sum() / (d * counts.numel()), layer.to(fraction.dtype))

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Compute exact attention."""
        return compute_dense_attention(q, k, v, call, self.pattern)

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, grad={self.grad}, path={self.path}, {self.sampling.distribution}"
        return f"{super().extra_repr()}, {own}"


def find_seen_by_group(x: Prepared) -> Tensor | None:
    """Find the keys that any query head of each value head sees, [#b, #groups, m]; None means all."""
    seen = x.seen_keys
    return seen if seen is None or seen.shape[1] == 1 else seen.unflatten(1, (x.grouped_v.shape[1], -1)).any(2)


def compute_chances(weight: Float[Tensor, "g dv d"]) -> Float[Tensor, "g d"]:
    """Compute the probability of each input feature: its share of the squared norm of W; uniform where W is zero."""
    norms = weight.square().sum(1)
    total = norms.sum(-1, keepdim=True)
    return torch.where(total > 0, norms / total.masked_fill(total == 0, 1), 1 / norms.shape[-1])
