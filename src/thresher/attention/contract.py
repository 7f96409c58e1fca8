"""The inputs and outputs of a mechanism: the pattern, the call, the attended values and their cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from thresher.attention.shared.sums import RunningSums


class Pattern(Enum):
    """Where attention is used, as (causal, cross): the taxonomy of CAB (arXiv 2210.07661).

    Causality concerns the query side: row t depends on nothing after t in its own sequence. In cross attention every
    key stays visible, but later *queries* must not influence row t.
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
    """The source of the values: v = x @ weight.T + bias."""

    x: Float[Tensor, "b m c"]
    weight: Float[Tensor, "hd c"]
    bias: Float[Tensor, " hd"] | None


class KeyCodes(NamedTuple):
    """Low-precision codes of keys, and the unit of the codes of each key."""

    codes: Int8[Tensor, "b hk m d"]
    unit: Float[Tensor, "b hk m 1"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The masks and extra inputs of one call. In masks True means visible; None means all visible.

    Attributes:
        queries: Padding of the query side; rows of hidden queries are zero and cost nothing.
        keys: Padding of the key side.
        pairs: Any other pattern of visible pairs; prefer `queries` and `keys`, which cost less.
        whole_mask: Whether `pairs` alone decide which keys a query sees. Causal self attention then adds no triangular
            mask: `pairs` may show later keys (prefix language models, image blocks), and a cache may have free slots.
        slots: Position of each query's own key in causal self attention; None means the last n keys in order.
        bias: Additive score bias (T5, ALiBi).
        source: The source of the values, for mechanisms with `needs_source`.
        codes: The result of `Mechanism.encode_keys` for these keys, if a cache kept it.
        sums: Running sums over the keys that a single query sees, if a cache keeps them; only a tail reads them.
    """

    queries: Bool[Tensor, "b n"] | None = None
    keys: Bool[Tensor, "b m"] | None = None
    pairs: Bool[Tensor, "#b #h n m"] | None = None
    whole_mask: bool = False
    slots: Int[Tensor, "#b n"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    source: ValueSource | None = None
    codes: KeyCodes | None = None
    sums: RunningSums | None = None

    def examples(self, rows: slice) -> "Call":
        """Select some of the examples."""

        def of(x: Tensor | None) -> Tensor | None:
            return x if x is None or len(x) == 1 else x[rows]

        return Call(
            queries=of(self.queries),
            keys=of(self.keys),
            pairs=of(self.pairs),
            whole_mask=self.whole_mask,
            slots=of(self.slots),
            bias=of(self.bias),
            source=self.source and self.source._replace(x=self.source.x[rows]),
            codes=self.codes and KeyCodes(*(x[rows] for x in self.codes)),
            sums=self.sums and self.sums.select(rows),
        )


class Cost(NamedTuple):
    """Multiply-accumulates and pairs of one call, per example and head.

    Values count the work of inference; gradients may be surrogates.

    Attributes:
        score: MACs of the scores of kept pairs.
        value: MACs of the weighted sum of values.
        select: MACs spent on the selection of pairs.
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
    """The attended values, their cost, and auxiliary losses.

    Attributes:
        out: The attended values, [b, h, n, dv] for a mechanism.
        cost: What they cost.
        losses: What the module wants to be small besides the loss of the task, by name, for each example and head. Only
            where gradients are recorded; `Metered.auxiliary` says how much each weighs.
    """

    out: Float[Tensor, "*shape"]
    cost: Cost
    losses: Mapping[str, Float[Tensor, "b h"]] = MappingProxyType({})
