"""The base of all mechanisms: queries, keys and values in, attended values and their cost out.

A mechanism owns no projections and keeps nothing between calls. Its author writes the arithmetic in `reference`, which
receives prepared tokens. `forward` is the same for all mechanisms and handles masks, types and non-finite values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from thresher.attention.backends import Backend, Implementation, check_backend, choose_implementation
from thresher.attention.contract import Attended, Call, Cost, KeyCodes, Pattern
from thresher.attention.options import check_integer
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import add_traces
from thresher.attention.shared.visibility import build_pair_mask, has_no_pairs

NO_TORCHSCRIPT = (
    "TorchScript is not supported: it would keep the choices that a mechanism makes for one example. "
    "Use torch.compile or torch.export, or call thresher.densify(model) first"
)


class Metered(nn.Module):
    """A module whose forward returns `Attended`, which a `ComputeMeter` reads.

    Attributes:
        num_heads: Length of the last dimension of the costs.
        dropout: Probability of dropping a weight in training; the host sets it.
        auxiliary: Names of the losses that `Attended.losses` may hold, and the weight of each by default.
    """

    num_heads: int
    dropout: float
    auxiliary: Mapping[str, float] = MappingProxyType({})

    def __prepare_scriptable__(self) -> Any:  # torch.jit.script calls it
        raise ValueError(NO_TORCHSCRIPT)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:  # torch.jit.trace calls it in place of forward
        raise ValueError(NO_TORCHSCRIPT)


class Mechanism(Metered, ABC):
    """An attention mechanism: q, k, v in; attended values and their cost out.

    A subclass has its own file or subfolder in this folder and a `conf/attention/<name>.yaml`. Hyper-parameters are
    keyword-only; the constructor holds the defaults and the YAML repeats them. The subclass defines `reference` and may
    list `implementations` that compute the same result faster.

    Attributes:
        supports: The supported patterns; the constructor refuses any other.
        implementations: Alternatives to `reference`, tried in this order.
        stochastic: Whether outputs depend on a seed.
        needs_source: Whether calls need `Call.source`.
        content_based: Whether outputs depend on queries and keys.
        dense_limit: Hyper-parameters at which the mechanism must equal softmax attention; None if there are none.
        selective: Hyper-parameters at which it drops some of a few keys, for checks where the defaults keep them all.
        precise: For stochastic mechanisms, hyper-parameters that bring outputs near `expectation`.
        drops_weights: Whether there are attention weights that dropout can act on.
        redrawn: Buffers of random draws. If a checkpoint stores them in another shape, the mechanism keeps its own.
        ranks_queries: Whether a row of a noncausal pattern depends on other queries; unmasked padding then leaks.
        pools_tokens: Whether a row of a noncausal pattern depends on tokens that `Call.pairs` hide from it but show to
            other rows; a causal mask of pairs then does not hide the future.
        slides: Whether causal rows stay the same when a cache drops keys that no query sees any more.
        reads_sums: Whether a tail reads `Call.sums`, so that a cache may keep them.
        keeps_types: Whether `reference` takes tokens in their own type and leaves autocast on. Otherwise tokens are at
            least fp32 and autocast is off.
        traces_itself: Whether `reference` itself writes NaN into the rows that read a non-finite number. Otherwise
            `forward` does so for all rows that see such a token.
        dropout: Probability of dropping an attention weight in training; the host sets it.
    """

    supports: ClassVar[frozenset[Pattern]] = frozenset(Pattern)
    implementations: ClassVar[tuple[Implementation[Any], ...]] = ()
    stochastic: ClassVar[bool] = False
    needs_source: ClassVar[bool] = False
    content_based: ClassVar[bool] = True
    drops_weights: ClassVar[bool] = True
    ranks_queries: bool = False
    pools_tokens: bool = False
    slides: bool = True
    dense_limit: ClassVar[Mapping[str, Any] | None] = None
    selective: ClassVar[Mapping[str, Any]] = {}
    precise: ClassVar[Mapping[str, Any] | None] = None
    redrawn: ClassVar[frozenset[str]] = frozenset()
    reads_sums: ClassVar[bool] = False
    keeps_types: ClassVar[bool] = False
    traces_itself: ClassVar[bool] = False
    backend: Backend

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            raise TypeError(f"{cls.__name__} overrides forward, which all mechanisms share; override reference")

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern, backend: Backend = "auto") -> None:
        super().__init__()
        if pattern not in self.supports:
            supported = ", ".join(sorted(p.name.lower() for p in self.supports))
            raise ValueError(
                f"{type(self).__name__} does not support {pattern.name.lower()} attention; it supports {supported}"
            )
        check_integer("num_heads", num_heads, 1)
        check_integer("head_dim", head_dim, 1)
        check_backend(backend, self.implementations)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.pattern = pattern
        self.backend = backend
        self.dropout = 0.0
        self.register_load_state_dict_pre_hook(_fill_in_own_state)

    @property
    def dropout(self) -> float:
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if p and not self.drops_weights:
            raise ValueError(
                f"{type(self).__name__} has no attention weights to drop, but dropout is {p:g}; "
                "set the model's attention dropout to 0"
            )
        self._dropout = p

    @final  # type: ignore[misc]
    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m dv"],
        call: Call,
    ) -> Attended:
        """Attend; keys and values may have fewer heads than queries (grouped-query attention).

        Rows that see no key are zero and have zero gradient. Outputs have the type of the values.
        """
        x = self.prepare(q, k, v, call)
        if has_no_pairs(q, k):
            return _attend_to_nothing(x)
        if _dense:
            x.trace_all()
            out, cost, losses = x.attend_densely()
        else:
            out, cost, losses = self._compute(x)
        if x.seen_queries is not None:
            out = out.masked_fill(~x.seen_queries[..., None], 0)
        return Attended(add_traces(out, x.trace).to(v.dtype), cost, losses)

    def _compute(self, x: Prepared) -> Attended:
        self.check(x)
        if not self.traces_itself:
            x.trace_all()
        implementation = choose_implementation(self, self.backend, self.implementations, x)
        kind = x.device.type
        with torch.autocast(kind, enabled=self.keeps_types and torch.is_autocast_enabled(kind)):
            if implementation is not None:
                return implementation.run(self, x)
            if not self.keeps_types:
                x.widen()
            return self.reference(x)

    @abstractmethod
    def reference(self, x: Prepared) -> Attended:
        """Define the mechanism, in PyTorch.

        Hidden tokens are zero, and every query head has its own keys. `x.visible` says which keys a query sees; rows
        that see none may hold any value. `x.attended` counts the cost of the usual case.
        """

    def check(self, x: Prepared) -> None:
        """Check that the mechanism can compute a call.

        Raises:
            ValueError: It cannot; the message says why.
        """

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Prepared:
        """Prepare a call for `reference`."""
        return Prepared(q, k, v, call, self.pattern, self.dropout if self.training else 0.0)

    def visible(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"], call: Call) -> Bool[Tensor, "b h n m"]:
        """Build the dense mask of visible pairs, for references and tests."""
        shape = (*q.shape[:3], k.shape[2])
        pairs = build_pair_mask(call, self.pattern, shape[2], shape[3], q.device)
        return q.new_ones(shape).bool() if pairs is None else pairs.expand(shape)

    def encode_keys(self, k: Float[Tensor, "b hk m d"]) -> KeyCodes | None:
        """Encode keys for a cache, which returns the codes as `Call.codes`; None if the mechanism uses no codes.

        Codes change the speed of a call, not its result.
        """
        return None

    def expectation(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m dv"],
        call: Call,
    ) -> Float[Tensor, "b h n dv"]:
        """Compute the limit of a stochastic forward; a deterministic one is its own expectation."""
        if self.stochastic:
            raise NotImplementedError(f"{type(self).__name__} is stochastic and must override expectation()")
        return self(q, k, v, call).out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_dim={self.head_dim}, {self.pattern.name.lower()}"


_dense = False


@contextmanager
def dense_attention() -> Iterator[None]:
    """Let every mechanism compute softmax attention over all visible pairs, as its network did before it was mounted.

    The network is then its own dense teacher, without a second copy of its weights.
    """
    global _dense
    before, _dense = _dense, True
    try:
        yield
    finally:
        _dense = before


def attends_densely() -> bool:
    """Tell whether mechanisms compute softmax attention, inside of `dense_attention`."""
    return _dense


@runtime_checkable
class MakeMechanism(Protocol):
    """Build a mechanism for a host: a class, or a class with bound hyper-parameters."""

    def __call__(self, num_heads: int, head_dim: int, pattern: Pattern) -> Mechanism: ...


def _attend_to_nothing(x: Prepared) -> Attended:
    """Return zero rows for a call without any pair, connected to the graph of its inputs."""
    row = x.grouped_q[..., :1].masked_fill(x.grouped_q.new_ones((), dtype=torch.bool), 0)
    out = row.expand(-1, -1, -1, x.value_dim) + (x.grouped_k.sum() + x.grouped_v.sum())
    zero = x.grouped_q.new_zeros(x.batch, x.heads, dtype=torch.float32)
    return Attended(out.to(x.grouped_v.dtype), Cost(*(zero.clone() for _ in Cost._fields)))


def _fill_in_own_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a dense checkpoint load with `strict=True`: a mechanism absent from it keeps its own state.

    A checkpoint that holds part of the mechanism is not a dense one, and stays an error.
    """
    own = module.state_dict(prefix=prefix)
    if not own.keys() & state.keys():
        state.update(own)
