"""The contract of a mechanism: what every file of this folder reads, and nothing else.

A mechanism takes queries, keys and values and returns attended values together with what they cost.
It owns no projections and keeps nothing between calls.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from thresher.attention import visibility
from thresher.attention.options import check_integer


class Pattern(Enum):
    """Where attention is used, as (causal, cross): the taxonomy of CAB (arXiv 2210.07661).

    Causal speaks of the query side: row t depends on nothing of its own sequence after t. In cross
    attention every key stays visible, but later *queries* may not influence row t.
    """

    NONCAUSAL_SELF = (False, False)
    CAUSAL_SELF = (True, False)
    NONCAUSAL_CROSS = (False, True)
    CAUSAL_CROSS = (True, True)

    @property
    def causal(self) -> bool:
        return self.value[0]

    @property
    def cross(self) -> bool:
        return self.value[1]


class ValueSource(NamedTuple):
    """What the values were projected from: v = x @ weight.T + bias."""

    x: Float[Tensor, "b m c"]
    weight: Float[Tensor, "hd c"]
    bias: Float[Tensor, " hd"] | None


class KeyCodes(NamedTuple):
    """Low-precision codes of keys, and what a code of each key stands for."""

    codes: Int8[Tensor, "b hk m d"]
    unit: Float[Tensor, "b hk m 1"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call knows besides q, k and v. True is visible, None is everything.

    Attributes:
        queries: Padding of the query side; hidden rows come out zero and cost nothing.
        keys: Padding of the key side.
        pairs: Any other pattern, the last resort.
        bias: Additive score bias (T5, ALiBi).
        source: What the values were projected from, for mechanisms that say `needs_source`.
        codes: What `Mechanism.codes_of` made of these keys, where it was kept since their tokens were read.
    """

    queries: Bool[Tensor, "b n"] | None = None
    keys: Bool[Tensor, "b m"] | None = None
    pairs: Bool[Tensor, "#b #h n m"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    source: ValueSource | None = None
    codes: KeyCodes | None = None

    def examples(self, rows: slice) -> "Call":
        """Return what a call of some of the examples knows."""

        def of(x: Tensor | None) -> Tensor | None:
            return x if x is None or len(x) == 1 else x[rows]

        return Call(
            queries=of(self.queries),
            keys=of(self.keys),
            pairs=of(self.pairs),
            bias=of(self.bias),
            source=self.source and self.source._replace(x=self.source.x[rows]),
            codes=self.codes and KeyCodes(*(x[rows] for x in self.codes)),
        )


class Cost(NamedTuple):
    """Multiply-accumulates and pairs of one call, per example and head.

    Values are what inference would spend; gradients may be surrogates.

    Attributes:
        score: MACs of the scores of kept pairs.
        value: MACs of the weighted sum of values.
        select: MACs spent on deciding what is kept.
        dense: MACs of exact attention on the visible pairs.
        kept: Pairs that received a weight.
        visible: Pairs left by padding, causality and `Call.pairs`.
    """

    score: Float[Tensor, "b h"]
    value: Float[Tensor, "b h"]
    select: Float[Tensor, "b h"]
    dense: Float[Tensor, "b h"]
    kept: Float[Tensor, "b h"]
    visible: Float[Tensor, "b h"]

    @property
    def total(self) -> Float[Tensor, "b h"]:
        return self.score + self.value + self.select

    def detach(self) -> "Cost":
        return Cost(*(part.detach() for part in self))


class Attended(NamedTuple):
    """The attended values, [b, h, n, dv] of a mechanism, and what they cost."""

    out: Float[Tensor, "*shape"]
    cost: Cost


class Metered(nn.Module):
    """A module whose forward returns `Attended`: what a `ComputeMeter` listens to.

    Attributes:
        num_heads: Length of the last dimension of its costs.
        dropout: Probability of dropping a weight in training; set by the host it is mounted in.
    """

    num_heads: int
    dropout: float


class Mechanism(Metered, ABC):
    """An attention mechanism: q, k, v in; attended values and their cost out.

    A subclass lives in a file of its own in this folder, with `conf/attention/<file>.yaml` beside it.
    Hyper-parameters are keyword-only; the constructor holds the defaults and the YAML repeats them.

    Attributes:
        supports: The patterns it is right in; any other is refused when it is built.
        stochastic: Whether outputs depend on a seed.
        needs_source: Whether it needs `Call.source`.
        content_based: Whether outputs depend on queries and keys at all.
        dense_limit: Hyper-parameters at which it must equal softmax attention, if there are any.
        precise: For stochastic mechanisms, hyper-parameters that bring it near `expectation`.
        drops_weights: Whether it has attention weights that dropout can act on.
        redrawn: Buffers of random draws: where stored ones are of another number or size, its own are as good.
        ranks_queries: Whether, where nothing is causal, a row depends on the other queries: padding among them leaks.
        dropout: Probability of dropping an attention weight in training; set by the host it is mounted in.
    """

    supports: ClassVar[frozenset[Pattern]] = frozenset(Pattern)
    stochastic: ClassVar[bool] = False
    needs_source: ClassVar[bool] = False
    content_based: ClassVar[bool] = True
    drops_weights: ClassVar[bool] = True
    ranks_queries: ClassVar[bool] = False
    dense_limit: ClassVar[Mapping[str, Any] | None] = None
    precise: ClassVar[Mapping[str, Any] | None] = None
    redrawn: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__()
        if pattern not in self.supports:
            supported = ", ".join(sorted(p.name.lower() for p in self.supports))
            raise ValueError(
                f"{type(self).__name__} does not support {pattern.name.lower()} attention; it supports {supported}"
            )
        check_integer("num_heads", num_heads, 1)
        check_integer("head_dim", head_dim, 1)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.pattern = pattern
        self.dropout = 0.0
        self.register_load_state_dict_pre_hook(_fill_in_own_state)

    @property
    def dropout(self) -> float:
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if p and not self.drops_weights:
            raise ValueError(
                f"{type(self).__name__} has no attention weights that a dropout of {p:g} could act on; "
                "set the model's attention dropout to 0"
            )
        self._dropout = p

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m dv"],
        call: Call,
    ) -> Attended:
        """Attend. Keys and values may have fewer heads than queries (grouped-query attention)."""

    def visible(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"], call: Call) -> Bool[Tensor, "b h n m"]:
        """Return the dense mask of visible pairs, for references and tests."""
        shape = (*q.shape[:3], k.shape[2])
        pairs = visibility.visible_pairs(call, self.pattern, shape[2], shape[3], q.device)
        return q.new_ones(shape).bool() if pairs is None else pairs.expand(shape)

    def codes_of(self, k: Float[Tensor, "b hk m d"]) -> KeyCodes | None:
        """Return what a host may keep beside cached keys, key by key, and give back as `Call.codes`; None is nothing.

        A call is the same without it, only slower.
        """
        return None

    def expectation(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m dv"],
        call: Call,
    ) -> Float[Tensor, "b h n dv"]:
        """Return what a stochastic forward converges to; a deterministic one is its own expectation."""
        if self.stochastic:
            raise NotImplementedError(f"{type(self).__name__} is stochastic and must define expectation()")
        return self(q, k, v, call).out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_dim={self.head_dim}, {self.pattern.name.lower()}"


@runtime_checkable
class MakeMechanism(Protocol):
    """Whatever builds a mechanism for a host: a class, or a class with hyper-parameters bound."""

    def __call__(self, num_heads: int, head_dim: int, pattern: Pattern) -> Mechanism: ...


def _fill_in_own_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a dense checkpoint load with `strict=True`: a mechanism absent from it keeps its own state.

    A checkpoint that holds part of the mechanism is not a dense one, and stays an error.
    """
    own = module.state_dict(prefix=prefix)
    if not own.keys() & state.keys():
        state.update(own)
