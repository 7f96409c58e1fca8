"""MCA: values are encoded from sampled input features, more for tokens that get more attention (arXiv 2201.12854).

Keeps      every visible pair: scores, softmax and the weighted sum are exact. What is sampled is the value projection
           x W: with v_j the largest attention that key j receives, r_j = ceil((n v_j / alpha)^2) of the d input
           features are drawn, in proportion to the squared norms of the rows of W; with r_j >= d the value is exact.
Costs      attention as dense, so that `compute` is 1: the saving lies in the projection. `fractions`, to be called by
           hand, counts it: samples of valid keys, the same over padded length as the paper counts, and the whole
           attention layer, where it is below a quarter by construction.
Trains     nothing of its own; sample counts have no gradient, so no budget can train it: `alpha` is set.
Estimates  the output, given its inputs, without bias, and (`grad=sampled`) the gradients given the output's. Across a
           nonlinearity neither is. `grad=exact` takes the gradient of exact values: less noise, but a bias.
Patterns   noncausal. A budget from the largest attention of *all* queries tells an early row about later ones, so
           causal patterns are refused unless `allow_noncausal_budget` says that this is known and meant. Padding is to
           be hidden among the queries, too, or it raises counts.
Emulates   `path=dense` in PyTorch multiplies by a matrix of sample weights, at more than dense cost, to study accuracy;
           the CPU's kernel computes the same from the features that were drawn. `path=gather` does so in PyTorch, in
           buckets of similar sample counts. It needs one draw for all tokens of a head (`draws=shared`), of which each
           token uses the first r_j, and waits for the device once a bucket. Fixed draws, those of evaluation, come
           from a generator, at which torch.compile breaks its graph.
Differs    from the official code: probabilities along the input axis of W (there along the output axis), counts rounded
           up (there down, which drops tokens and biases), n counts valid keys, padded queries do not raise counts, any
           batch size, any shape of W. `reproduce_paper` brings back n = padded length and rounding down.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend, check_backend, served_by_kernel
from thresher.attention.base import Attended, Call, Cost, Mechanism, Pattern, ValueSource
from thresher.attention.dense import attend_densely
from thresher.attention.functional import at_least_fp32, expand_heads, masked_softmax
from thresher.attention.options import check_choice, check_flags, check_integer, check_number
from thresher.attention.visibility import count_pairs, hide_tokens, no_pairs, seen_tokens, visible_pairs
from thresher.kernels import mca as kernel

Sampler = Literal["multinomial", "poisson"]
Grad = Literal["sampled", "exact"]
Draws = Literal["token", "shared"]
Path = Literal["dense", "gather"]
Resample = Literal["forward", "never"]


class Fractions(NamedTuple):
    """Value MACs as shares of dense: of valid keys (the honest one), over padded length, and of the whole layer."""

    valid: Float[Tensor, ""]
    padded: Float[Tensor, ""]
    layer: Float[Tensor, ""]


class Mca(Mechanism):
    """Softmax attention over values whose projection is sampled.

    Args:
        alpha: Error coefficient: larger is cheaper and noisier; 0 is exact.
        sampler: "multinomial", as published, or "poisson" counts, independent for each feature.
        grad: "sampled" or "exact".
        draws: Fresh draws for each "token", or one sequence "shared" by the tokens of a head.
        path: "dense" simulates the sample where PyTorch computes it; "gather" computes only what was drawn, and wants
            shared multinomial draws.
        reproduce_paper: n is the padded length and counts are rounded down.
        allow_noncausal_budget: Permit causal patterns, in which counts depend on later queries.
        resample: Draw anew at each "forward" in training, or "never". Evaluation draws from `seed`.
        seed: Of the draws that are fixed.
        backend: "reference" is PyTorch; "cpu" the kernel, which projects values, refused where it cannot; "auto" the
            kernel wherever it can. Attention weights are PyTorch's.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    supports = frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS})
    stochastic = True
    ranks_queries = True
    needs_source = True
    dense_limit = {"alpha": 0.0}
    precise = {"alpha": 0.05}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        alpha: float = 1.0,
        sampler: Sampler = "multinomial",
        grad: Grad = "sampled",
        draws: Draws = "token",
        path: Path = "dense",
        reproduce_paper: bool = False,
        allow_noncausal_budget: bool = False,
        resample: Resample = "forward",
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        if allow_noncausal_budget:
            object.__setattr__(self, "supports", frozenset(Pattern))
        super().__init__(num_heads, head_dim, pattern)
        check_backend(backend, "mca")
        check_number("alpha", alpha, least=0.0)
        check_integer("seed", seed, 0, 2**63 - 1)
        check_flags(reproduce_paper=reproduce_paper, allow_noncausal_budget=allow_noncausal_budget)
        for name, got, choices in (
            ("sampler", sampler, Sampler),
            ("grad", grad, Grad),
            ("draws", draws, Draws),
            ("path", path, Path),
            ("resample", resample, Resample),
        ):
            check_choice(name, got, get_args(choices))
        if path == "gather" and (draws, sampler) != ("shared", "multinomial"):
            raise ValueError(f"path=gather needs draws=shared and sampler=multinomial, got {draws} and {sampler}")
        self.alpha, self.sampler, self.grad, self.draws, self.path = alpha, sampler, grad, draws, path
        self.reproduce_paper, self.resample, self.seed, self.backend = reproduce_paper, resample, seed, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        if self.alpha == 0 or no_pairs(q, k):
            return attend_densely(q, k, v, call, self.pattern, self.dropout if self.training else 0.0)
        (b, h, n, _), m = q.shape, k.shape[2]
        groups = v.shape[1]
        seen = seen_by_group(call, self.pattern, n, m, groups)
        source = self.source_of(call, seen)
        visible = visible_pairs(call, self.pattern, n, m, q.device)
        q, k, v = hide_tokens(q, expand_heads(k, h), expand_heads(v, h), call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            weights = self.weights(at_least_fp32(q), at_least_fp32(k), call, visible)
            counts = self.counts(weights.detach(), call, groups, source.x.shape[-1])
            values = self.encode(source, counts)
            if seen is not None:
                values = values.masked_fill(~seen[..., None], 0)
            values = expand_heads(values, h)
            weights = F.dropout(weights, self.dropout, self.training)
            out = weights @ values
            if self.grad == "exact":
                exact = weights @ at_least_fp32(v)
                out = exact + (out - exact).detach()
        pairs = count_pairs(visible, (b, h, n, m), q.device)
        score, value = pairs * q.shape[-1], pairs * v.shape[-1]
        return Attended(out.to(v.dtype), Cost(score, value, pairs * 0, score + value, pairs, pairs))

    def source_of(self, call: Call, seen: Tensor | None) -> ValueSource:
        """Return what values are projected from, in fp32 at least, with tokens that no head sees zeroed."""
        if call.source is None:
            raise ValueError("MCA samples the projection of the values, and this call does not say what it was")
        x, weight, bias = call.source
        x = at_least_fp32(x)
        if seen is not None:
            x = x.masked_fill(~seen.any(1)[..., None], 0)
        return ValueSource(x, at_least_fp32(weight), None if bias is None else at_least_fp32(bias))

    def weights(self, q: Tensor, k: Tensor, call: Call, visible: Tensor | None) -> Float[Tensor, "b h n m"]:
        """Return the exact attention weights."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if call.bias is not None:
            scores = scores + call.bias
        return masked_softmax(scores, visible)

    def counts(self, weights: Float[Tensor, "b h n m"], call: Call, groups: int, d: int) -> Float[Tensor, "b g m"]:
        """Return the samples of each key and value head, 0 to d; heads that share a value take the largest."""
        n, m = weights.shape[2:]
        importance = weights.amax(2).unflatten(1, (groups, -1)).amax(2)
        seen = seen_by_group(call, self.pattern, n, m, groups)
        length: Tensor | int = m
        if seen is not None and not self.reproduce_paper:
            length = seen.sum(-1, keepdim=True)
        wanted = (length * importance / max(self.alpha, torch.finfo(weights.dtype).tiny)).square().clamp_max(d)
        return wanted.floor() if self.reproduce_paper else wanted.ceil()

    def encode(self, source: ValueSource, counts: Float[Tensor, "b g m"]) -> Float[Tensor, "b g m dv"]:
        """Project tokens to values from as many sampled features as `counts` says."""
        groups, d = counts.shape[1], source.x.shape[-1]
        weight = source.weight.unflatten(0, (groups, -1))
        chances = sampling_chances(weight.detach())
        if served_by_kernel(self.backend, "mca", (source.x, source.weight), self.obstacle()):
            exact = counts >= d
            uniform = self.uniform(chances, counts, d, self.generator(chances))
            drawn = counts.masked_fill(exact, 0).to(source.x.dtype)
            values = kernel.encode(source.x, weight.mT, chances, chances.cumsum(-1), uniform, drawn)
            values = torch.where(exact[..., None], source.x[:, None] @ weight.mT, values)
        elif self.path == "gather":
            values = self.gathered(source.x, weight, chances, counts)
        else:
            share = self.sample(chances, counts, d)
            values = (source.x[:, None] * share) @ weight.mT
        if source.bias is not None:
            values = values + source.bias.unflatten(0, (groups, 1, -1))
        return values

    def obstacle(self) -> str | None:
        """Say why the kernel cannot project values."""
        if self.sampler == "poisson":
            return "it draws as many features as were counted, and none by Poisson's law"
        return None if self.draws == "token" else "it draws for each token apart"

    def sample(self, chances: Float[Tensor, "g d"], counts: Float[Tensor, "b g m"], d: int) -> Float[Tensor, "b g m d"]:
        """Return how often each feature was drawn, divided by how often that was to be expected; 1 where exact."""
        generator = self.generator(chances)
        if self.sampler == "poisson":
            # Poisson(r) draws: those that arrive before time r, with exponential gaps. Their number is bounded for all
            # purposes, and random numbers are consumed alike whatever the counts of the neighbours are.
            order = self.sequence(chances, counts, d + 20 + math.ceil(10 * d**0.5), generator)
            uniform = torch.rand(order.shape, dtype=chances.dtype, device=chances.device, generator=generator)
            used = (-(1 - uniform).log()).cumsum(-1) <= counts[..., None]
        else:
            order = self.sequence(chances, counts, d, generator)
            used = torch.arange(d, device=order.device) < counts[..., None]
        drawn = torch.zeros(*counts.shape, d, dtype=chances.dtype, device=chances.device)
        drawn = drawn.scatter_add_(-1, order.expand(used.shape), used.to(drawn.dtype))
        expected = counts[..., None] * chances[:, None]
        share = drawn / expected.masked_fill(expected == 0, 1)
        return share.masked_fill((counts >= d)[..., None], 1)

    def sequence(
        self, chances: Float[Tensor, "g d"], counts: Tensor, length: int, generator: torch.Generator | None
    ) -> Int[Tensor, "#b g #m length"]:
        """Draw features for each token, or one sequence of them for all tokens of a head."""
        uniform = self.uniform(chances, counts, length, generator).permute(2, 1, 0, 3).contiguous()
        order = torch.searchsorted(chances.cumsum(-1), uniform.flatten(1), right=True)
        return order.clamp_max(chances.shape[-1] - 1).view(uniform.shape).transpose(0, 1)

    def uniform(
        self, chances: Float[Tensor, "g d"], counts: Tensor, length: int, generator: torch.Generator | None
    ) -> Float[Tensor, "#m #b g length"]:
        """Return what features are drawn by.

        Fixed draws are the same for each example of a batch, so that results do not depend on its size. Tokens come
        first: on a CPU, padding behind a sequence then leaves the draws of its tokens alone.
        """
        b, groups, m = counts.shape
        if self.draws == "shared":
            b, m = 1, 1
        elif generator is not None:
            b = 1
        return torch.rand((m, b, groups, length), dtype=chances.dtype, device=chances.device, generator=generator)

    def gathered(
        self,
        x: Float[Tensor, "b m d"],
        weight: Float[Tensor, "g dv d"],
        chances: Float[Tensor, "g d"],
        counts: Float[Tensor, "b g m"],
    ) -> Float[Tensor, "b g m dv"]:
        """Project tokens in buckets: those with 2^(i-1) < r <= 2^i samples through 2^i columns, exact ones all."""
        d = x.shape[-1]
        order = self.sequence(chances, counts, d, self.generator(chances))[0, :, 0]
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

    def generator(self, like: Tensor) -> torch.Generator | None:
        """Return what to draw from: the global generator in training, one that always starts at `seed` otherwise."""
        if self.training and self.resample == "forward":
            return None
        return torch.Generator(like.device).manual_seed(self.seed)

    @torch.no_grad()
    def fractions(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Fractions:
        """Return the value MACs of a call as shares of the dense ones (see the method card).

        The layer counts its four projections, scores and weighted sum: 4 n d^2 + 2 n^2 d, n the mean of valid keys.
        """
        (_, h, n, _), m, groups = q.shape, k.shape[2], v.shape[1]
        seen = seen_by_group(call, self.pattern, n, m, groups)
        source = self.source_of(call, seen)
        d = source.x.shape[-1]
        q, k, _ = hide_tokens(q, expand_heads(k, h), expand_heads(v, h), call, self.pattern)
        visible = visible_pairs(call, self.pattern, n, m, q.device)
        with torch.autocast(q.device.type, enabled=False):
            weights = self.weights(at_least_fp32(q), at_least_fp32(k), call, visible)
        counts = self.counts(weights, call, groups, d) if self.alpha else torch.full_like(weights[:, :groups, 0], d)
        counts = counts if seen is None else counts.masked_fill(~seen, 0)
        valid = torch.full_like(counts[..., 0], m) if seen is None else seen.sum(-1).expand_as(counts[..., 0])
        fraction = counts.sum() / (d * valid.sum())
        length = valid.double().mean()
        rest = 3 * length * d**2 + 2 * length**2 * d
        layer = (rest + fraction * length * d**2) / (rest + length * d**2)
        return Fractions(fraction, counts.sum() / (d * counts.numel()), layer.to(fraction.dtype))

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Float[Tensor, "b h n dv"]:
        """Return exact attention."""
        return attend_densely(q, k, v, call, self.pattern).out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, sampler={self.sampler}, grad={self.grad}, path={self.path}"


def seen_by_group(call: Call, pattern: Pattern, n: int, m: int, groups: int) -> Tensor | None:
    """Return which keys any query head of each value head sees, [#b, #groups, m]; None is all."""
    seen = seen_tokens(call, pattern, n, m)[1]
    return seen if seen is None or seen.shape[1] == 1 else seen.unflatten(1, (groups, -1)).any(2)


def sampling_chances(weight: Float[Tensor, "g dv d"]) -> Float[Tensor, "g d"]:
    """Return the chance of each input feature: its share of the squared norm of W; uniform where W is zero."""
    norms = weight.square().sum(1)
    total = norms.sum(-1, keepdim=True)
    return torch.where(total > 0, norms / total.masked_fill(total == 0, 1), 1 / norms.shape[-1])
