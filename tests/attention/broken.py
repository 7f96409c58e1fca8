"""Mechanisms that break the contract on purpose, each in one way, and two honest ones of kinds that we lack."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention import Attended, Call, Cost, Mechanism, Pattern
from thresher.attention.dense import Dense
from thresher.attention.mean import Mean
from thresher.attention.prepared import Prepared

Forward = Callable[[Tensor, Tensor, Tensor, Call], Attended]


class Seen:
    """What a broken mechanism works with: its inputs, and dense attention to spoil."""

    def __init__(self, mechanism: Mechanism, dense: Forward, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        self.mechanism, self.dense = mechanism, dense
        self.q, self.k, self.v, self.call = q, k, v, call

    @cached_property
    def attended(self) -> Attended:
        return self.dense(self.q, self.k, self.v, self.call)

    @property
    def out(self) -> Tensor:
        return self.attended.out

    @property
    def cost(self) -> Cost:
        return self.attended.cost

    @property
    def visible(self) -> Tensor:
        return self.mechanism.visible(self.q, self.k, self.call)


class Around(Dense):
    """A mechanism that goes around the template: `attend` stands in for `forward`, and `whole` is what that was."""

    def whole(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        return Mechanism.forward(self, q, k, v, call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        return self.whole(q, k, v, call)


def _attend(mechanism: Around, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
    return mechanism.attend(q, k, v, call)


Around.forward = _attend  # which no class body may define


def breaks(change: Callable[[Seen], Attended]) -> type[Mechanism]:
    """Return dense attention with another forward."""

    class Broken(Around):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
            return change(Seen(self, self.whole, q, k, v, call))

    Broken.__name__ = change.__name__
    return Broken


def breaks_output(change: Callable[[Seen], Tensor]) -> type[Mechanism]:
    """Return dense attention with another output."""
    return breaks(wraps(change)(lambda s: s.attended._replace(out=change(s))))


def breaks_cost(change: Callable[[Seen], Cost]) -> type[Mechanism]:
    """Return dense attention with another cost."""
    return breaks(wraps(change)(lambda s: s.attended._replace(cost=change(s))))


@breaks_output
def nan_in_empty_rows(s: Seen) -> Tensor:
    return s.out.masked_fill(~s.visible.any(-1, keepdim=True), float("nan"))


@breaks_output
def forgets_value_dimension(s: Seen) -> Tensor:
    return s.out[..., : s.q.shape[-1]]


@breaks_cost
def counts_padded_rows(s: Seen) -> Cost:
    everything = torch.full_like(s.cost.visible, s.q.shape[2] * s.k.shape[2])
    return s.cost._replace(visible=everything, dense=everything * (s.q.shape[3] + s.v.shape[3]))


@breaks_cost
def keeps_more_than_visible(s: Seen) -> Cost:
    return s.cost._replace(kept=s.cost.visible + 1)


@breaks_cost
def negative_cost(s: Seen) -> Cost:
    return s.cost._replace(select=s.cost.select - 1)


@breaks_cost
def cost_without_heads(s: Seen) -> Cost:
    return Cost(*(part.mean(1) for part in s.cost))


@breaks
def adds_an_undeclared_loss(s: Seen) -> Attended:
    return s.attended._replace(losses={"own": s.cost.kept})


@breaks_output
def squeezes_one_token(s: Seen) -> Tensor:
    return s.out.squeeze(2)


@breaks_output
def nan_with_more_queries_than_keys(s: Seen) -> Tensor:
    return s.out * (torch.nan if s.q.shape[2] > s.k.shape[2] else 1)


@breaks
def padding_in_batch_maximum(s: Seen) -> Attended:
    return s.dense(s.q / s.k.abs().amax(), s.k, s.v, s.call)


@breaks_output
def padding_through_sorting(s: Seen) -> Tensor:
    return s.out + s.k.norm(dim=-1).argsort(-1)[..., :1, None] * 1e-9


@breaks_cost
def padding_in_cost(s: Seen) -> Cost:
    return s.cost._replace(select=(s.k.norm(dim=-1) > 5).sum(-1).float())


@breaks_output
def padding_of_queries_in_codes(s: Seen) -> Tensor:
    return s.out + s.q.abs().amax((-2, -1), keepdim=True).nan_to_num() * 1e-9


@breaks_output
def hides_by_one_mask_at_a_time(s: Seen) -> Tensor:
    leaking = s.v if s.call.keys is None else s.v.masked_fill(~s.call.keys[:, None, :, None], 0)
    return s.dense(s.q, s.k, s.v.nan_to_num(), s.call).out + leaking.sum() * 1e-9


@breaks_output
def averages_in_empty_rows(s: Seen) -> Tensor:
    empty = ~s.visible.any(-1, keepdim=True)
    return torch.where(empty, s.v.mean(2, keepdim=True), s.out)


@breaks
def shows_hidden_queries(s: Seen) -> Attended:
    return s.dense(s.q, s.k, s.v, replace(s.call, queries=None))


@breaks_output
def centres_queries(s: Seen) -> Tensor:
    return s.dense(s.q - s.q.mean(2, keepdim=True), s.k, s.v, s.call).out


class RanksNothing(Dense):
    ranks_queries = True


class PoolsNothing(Dense):
    pools_tokens = True


class SlidesAfterAll(Dense):
    slides = False


@breaks_output
def centres_keys(s: Seen) -> Tensor:
    return s.dense(s.q, s.k, s.v - s.v.mean(2, keepdim=True), s.call).out


@breaks
def always_hides_the_future(s: Seen) -> Attended:
    return s.dense(s.q, s.k, s.v, replace(s.call, whole_mask=False))


@breaks_output
def shows_only_gradients_to_hidden_queries(s: Seen) -> Tensor:
    return s.out + (s.q - s.q.detach())


@breaks_output
def softmax_of_nothing(s: Seen) -> Tensor:
    scores = s.q @ s.k.transpose(-2, -1) * s.q.shape[-1] ** -0.5 + torch.where(s.visible, 0.0, -torch.inf)
    return scores.softmax(-1).masked_fill(~s.visible, 0) @ s.v


@breaks_output
def ranks_queries(s: Seen) -> Tensor:
    return s.out + s.q.norm(dim=-1).argsort(-1).argsort(-1)[..., None] * 1e-9


@breaks
def scales_by_largest_query(s: Seen) -> Attended:
    return s.dense(s.q / s.q.abs().amax((-2, -1), keepdim=True), s.k, s.v, s.call)


@breaks_output
def sees_one_token_ahead(s: Seen) -> Tensor:
    return s.out + 1e-9 * s.v.roll(-1, 2)


@breaks
def centres_over_the_batch(s: Seen) -> Attended:
    return s.dense(s.q - s.q.mean(0), s.k, s.v, s.call)


@breaks_cost
def shares_cost_over_the_batch(s: Seen) -> Cost:
    return Cost(*(part.mean(0, keepdim=True).expand_as(part) for part in s.cost))


@breaks
def forgets_keys_in_backward(s: Seen) -> Attended:
    return s.dense(s.q, s.k.detach(), s.v, s.call)


@breaks
def forgets_slots(s: Seen) -> Attended:
    """See keys near the row's own, and take the queries for the last ones, wherever a cache put them."""
    n, m = s.q.shape[2], s.k.shape[2]
    near = (torch.arange(m - n, m)[:, None] - torch.arange(m)).abs() <= 3
    near = near if s.call.pairs is None else near & s.call.pairs
    return s.dense(s.q, s.k, s.v, replace(s.call, pairs=near.expand(1, 1, n, m)))


class LooksAtQueries(Mean):
    def reference(self, x: Prepared) -> Attended:
        attended = super().reference(x)
        return attended._replace(out=attended.out + x.q * 1e-9)


@breaks
def wrong_scale(s: Seen) -> Attended:
    return s.dense(s.q * (1 + 1e-9), s.k, s.v, s.call)


@breaks_output
def wrong_normaliser(s: Seen) -> Tensor:
    return s.out * (1 - 1e-5)


@breaks
def wrong_gradient_only(s: Seen) -> Attended:
    return s.dense(s.q, s.k, 2 * s.v - s.v.detach(), s.call)


@breaks_cost
def forgets_the_scores(s: Seen) -> Cost:
    return s.cost._replace(score=s.cost.score * 0)


@breaks_cost
def drops_a_pair(s: Seen) -> Cost:
    return s.cost._replace(kept=s.cost.kept - 1)


@breaks
def ignores_bias(s: Seen) -> Attended:
    return s.dense(s.q, s.k, s.v, replace(s.call, bias=None))


@breaks
def forgets_bias_in_backward(s: Seen) -> Attended:
    bias = None if s.call.bias is None else s.call.bias.detach() + 0 * s.call.bias
    return s.dense(s.q, s.k, s.v, replace(s.call, bias=bias))


@breaks
def shares_heads_in_the_wrong_order(s: Seen) -> Attended:
    repeats = s.q.shape[1] // s.k.shape[1]
    return s.dense(s.q, s.k.repeat(1, repeats, 1, 1), s.v.repeat(1, repeats, 1, 1), s.call)


@breaks_output
def undeclared_randomness(s: Seen) -> Tensor:
    return s.out + torch.randn_like(s.out) * 1e-9 if s.mechanism.training else s.out


class UndeclaredDeterminism(Dense):
    stochastic = True


class RandomInEvaluation(Around):
    stochastic = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = self.whole(q, k, v, call)
        return attended._replace(out=attended.out + torch.randn_like(attended.out))


@breaks_output
def draws_in_evaluation(s: Seen) -> Tensor:
    torch.rand(())
    return s.out


@breaks_output
def overwrites_queries(s: Seen) -> Tensor:
    out = s.out
    s.q.detach()[..., 0] += 1
    return out


@breaks
def reads_memory_in_order(s: Seen) -> Attended:
    strides = torch.empty(s.q.shape).stride()
    return s.dense(torch.as_strided(s.q, s.q.shape, strides), s.k, s.v, s.call)


@breaks
def causal_from_the_upper_left(s: Seen) -> Attended:
    return s.dense(s.q, s.k, s.v, replace(s.call, pairs=torch.ones_like(s.visible).tril()))


class PromisesAnotherExpectation(Dense):
    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self(q, k, v, call).out * (1 + 1e-9)


@breaks_output
def rounds_coarsely(s: Seen) -> Tensor:
    return (s.out * 32).round() / 32


@breaks_output
def answers_in_fp32(s: Seen) -> Tensor:
    return s.out.float()


@breaks_cost
def counts_in_bf16(s: Seen) -> Cost:
    return Cost(*(part.bfloat16().float() for part in s.cost))


@breaks_output
def overflows_in_fp16(s: Seen) -> Tensor:
    return s.out * 2**17 / 2**17


@breaks_output
def infinite_gradients_in_bf16(s: Seen) -> Tensor:
    return s.out + (s.q - s.q.detach()).abs().sqrt()


@breaks_output
def drops_in_evaluation(s: Seen) -> Tensor:
    return F.dropout(s.out, s.mechanism.dropout, not s.mechanism.training)


class NeverDrops(Around):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        plain = Dense(self.num_heads, self.head_dim, self.pattern)
        return plain(q, k, v, call)


@breaks_output
def drops_without_rescaling(s: Seen) -> Tensor:
    return s.out * (1 - s.mechanism.dropout) if s.mechanism.training else s.out


@breaks_cost
def counts_only_what_is_not_dropped(s: Seen) -> Cost:
    return s.cost._replace(kept=s.cost.kept * (1 - s.mechanism.dropout)) if s.mechanism.training else s.cost


@breaks
def branches_on_values(s: Seen) -> Attended:
    return s.attended if s.q.sum().item() > 1e9 else s.dense(s.q * 1, s.k, s.v, s.call)


@breaks
def differs_when_compiled(s: Seen) -> Attended:
    return s.dense(s.q * 2 if torch.compiler.is_compiling() else s.q, s.k, s.v, s.call)


class Noisy(Around):
    """Attention plus noise that falls with the number of samples, as a stochastic mechanism should."""

    stochastic = True

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern, *, samples: int = 1) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.samples = samples

    def noise(self, x: Tensor) -> Tensor:
        rng = None if self.training else torch.Generator().manual_seed(0)
        return torch.randn(x.shape, generator=rng, dtype=x.dtype) / self.samples**0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = self.whole(q, k, v, call)
        return attended._replace(out=attended.out + self.noise(attended.out))

    def expectation(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self.whole(q, k, v, call).out


class AsNoisyAsEver(Noisy):
    def noise(self, x: Tensor) -> Tensor:
        return super().noise(x) * self.samples**0.5


class Biased(Noisy):
    def noise(self, x: Tensor) -> Tensor:
        return super().noise(x) + 1


class FromSource(Around):
    """Dense attention that projects its values itself, as a mechanism that saves in the projection does."""

    needs_source = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        assert call.source is not None
        projected = F.linear(*call.source).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        return self.whole(q, k, projected + torch.zeros_like(v), call)


@breaks_output
def leaks_through_the_source(s: Seen) -> Tensor:
    assert s.call.source is not None
    return s.out + s.call.source.x.nan_to_num().sum((1, 2))[:, None, None, None] * 1e-9


leaks_through_the_source.needs_source = True
