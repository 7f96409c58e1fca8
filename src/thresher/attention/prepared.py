"""A call as `Mechanism.reference` receives it: expanded heads, zeroed hidden tokens, masks and counts."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.contract import Attended, Call, Cost, Pattern
from thresher.attention.shared.divergence import trace_rows, trace_vectors, zero_nonfinite
from thresher.attention.shared.functional import expand_heads, promote_to_fp32
from thresher.attention.shared.visibility import (
    build_pair_mask,
    count_pairs,
    count_visible_keys,
    find_own_slots,
    find_seen_tokens,
    hide_tokens,
    hides_later_keys,
)


class Prepared:
    """Queries, keys and values of a call with their masks and counts.

    Everything is computed on first use: expanded heads, hidden tokens, masks.

    Attributes:
        call: Masks and extra inputs.
        pattern: Where attention is used.
        dropout: Probability of dropping an attention weight in this call; 0 outside of training.
        grouped_q: Original queries, [b, h, n, d].
        grouped_k: Original keys, [b, hk, m, d]; query heads may share them, and hidden keys may hold any value.
        grouped_v: Original values, [b, hk, m, dv].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, pattern: Pattern, dropout: float) -> None:
        self.call, self.pattern, self.dropout = call, pattern, dropout
        self.grouped_q, self.grouped_k, self.grouped_v = q, k, v
        self.batch, self.heads, self.n, self.head_dim = q.shape
        self.m, self.value_dim = v.shape[2], v.shape[3]
        hides_later_keys(call, pattern, self.n, self.m)  # raises if n > m, also in an empty call
        self.trace: Tensor | None = None
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None
        self._visible: Tensor | None = None
        self._score_traces: tuple[Tensor, Tensor] | None = None
        self._seen: tuple[Tensor | None, Tensor | None] | None = None
        self._visible_keys: Tensor | None = None
        self._pairs: Tensor | None = None
        self._has_mask = False

    @property
    def q(self) -> Float[Tensor, "b h n d"]:
        """Queries; zero where a query sees no key."""
        return self._hide()[0]

    @property
    def k(self) -> Float[Tensor, "b h m d"]:
        """Keys, one head for each query head; zero where no query sees a key."""
        return self._hide()[1]

    @property
    def v(self) -> Float[Tensor, "b h m dv"]:
        """Values, one head for each query head; zero where no query sees a key."""
        return self._hide()[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Numbers of examples, query heads, queries and keys."""
        return self.batch, self.heads, self.n, self.m

    @property
    def scale(self) -> float:
        """Factor that turns products of queries and keys into scores, 1 / sqrt(d)."""
        return self.head_dim**-0.5

    @property
    def device(self) -> torch.device:
        return self.grouped_q.device

    @property
    def visible(self) -> Bool[Tensor, "#b #h #n m"] | None:
        """Pairs that padding, causality and masks leave visible; None means all."""
        if not self._has_mask:
            self._visible = build_pair_mask(self.call, self.pattern, self.n, self.m, self.device)
            self._has_mask = True
        return self._visible

    def visible_rows(self, rows: range) -> Bool[Tensor, "#b #h #rows m"] | None:
        """Build the rows of `visible` for some consecutive queries."""
        return build_pair_mask(self.call, self.pattern, self.n, self.m, self.device, rows)

    @property
    def places(self) -> Int[Tensor, "#b n"]:
        """The position of each query among the keys of self attention."""
        return find_own_slots(self.call, self.n, self.m, self.device)

    @property
    def seen_queries(self) -> Bool[Tensor, "#b #h n"] | None:
        """Queries that see any key; None means all."""
        return self._find_seen()[0]

    @property
    def seen_keys(self) -> Bool[Tensor, "#b #h m"] | None:
        """Keys that any query sees; None means all."""
        return self._find_seen()[1]

    @property
    def visible_keys(self) -> Int[Tensor, "#b #h n"]:
        """The number of keys that each query sees."""
        if self._visible_keys is None:
            mask = self.visible if self.call.pairs is not None else None
            self._visible_keys = count_visible_keys(self.call, self.pattern, self.n, self.m, self.device, mask)
        return self._visible_keys

    @property
    def pairs(self) -> Float[Tensor, "b h"]:
        """The number of visible pairs of each example and head."""
        if self._pairs is None:
            self._pairs = self.visible_keys.sum(-1).float().expand(self.batch, self.heads)
        return self._pairs

    @property
    def causal_shift(self) -> int | None:
        """Offset of causal self attention, in which query i sees keys j <= i + shift; None without causality."""
        hides = self.pattern is Pattern.CAUSAL_SELF and self.n > 1
        return self.m - self.n if hides else None

    def scores(self) -> Float[Tensor, "b h n m"]:
        """Compute the scores of all pairs, hidden ones included: q k^T / sqrt(d) plus the bias of the call."""
        scores = self.q @ self.k.mT * self.scale
        return scores if self.call.bias is None else scores + self.call.bias

    def drop(self, weights: Tensor) -> Tensor:
        """Apply dropout to attention weights."""
        return F.dropout(weights, self.dropout, self.dropout > 0)

    def attended(
        self, out: Float[Tensor, "b h n dv"], kept: Bool[Tensor, "#b #h #n m"] | Float[Tensor, "b h"] | None = None
    ) -> Attended:
        """Return an output with its cost: a score for every visible pair, a weighted value for every kept one.

        Args:
            out: The attended values.
            kept: Kept pairs, or their number for each example and head; None means every visible pair.
        """
        if kept is None:
            kept = self.pairs
        elif kept.dtype == torch.bool:
            kept = count_pairs(kept, self.shape, self.device)
        return Attended(
            out,
            Cost(
                score=kept * self.head_dim,
                value=kept * self.value_dim,
                select=(self.pairs - kept) * self.head_dim,
                dense=self.pairs * (self.head_dim + self.value_dim),
                kept=kept,
                visible=self.pairs,
            ),
        )

    def attend_densely(self) -> Attended:
        """Attend to every visible pair by PyTorch's softmax attention; rows without a key hold any value."""
        bias = None if self.call.bias is None else self.call.bias.to(self.q.dtype)
        mask: Tensor | None = bias
        if self.visible is not None:
            # Backends differ on rows without a key, so such a row attends to everything.
            mask = self.visible | ~self.visible.any(-1, keepdim=True)
            if bias is not None:
                mask = bias.masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=mask, dropout_p=self.dropout)
        return self.attended(out)

    def examples(self, rows: slice) -> "Prepared":
        """Select some of the examples."""
        q, k, v = (x[rows] for x in (self.grouped_q, self.grouped_k, self.grouped_v))
        return Prepared(q, k, v, self.call.examples(rows), self.pattern, self.dropout)

    def rows(self, rows: range) -> "Prepared":
        """Select consecutive queries of a call without masks of pairs; in causal self attention, keys up to the last.

        Tokens are the prepared ones, so hidden and non-finite ones are zero.
        """
        chosen = slice(rows.start, rows.stop)
        last = self.m if self.causal_shift is None else self.causal_shift + rows.stop
        queries = None if self.call.queries is None else self.call.queries[:, chosen]
        keys = None if self.call.keys is None else self.call.keys[:, :last]
        tokens = self.q[:, :, chosen], self.k[:, :, :last], self.v[:, :, :last]
        slots = None if self.pattern.cross else self.places[:, chosen]
        return Prepared(*tokens, Call(queries=queries, keys=keys, slots=slots), self.pattern, self.dropout)

    def trace_all(self, *, values: bool = True) -> Float[Tensor, "b h m"]:
        """Zero the tokens that are not finite, and record the rows that see them in `trace`.

        Args:
            values: Whether to record rows that see a value that is not finite, too.

        Returns:
            The traces of values.
        """
        of_q, of_k, of_v = traces = [trace_vectors(x) for x in (self.q, self.k, self.v)]
        self.trace = trace_rows(of_q, of_k + of_v if values else of_k, self.call, self.pattern, (self.n, self.m))
        q, k, v = (zero_nonfinite(x, trace) for x, trace in zip((self.q, self.k, self.v), traces, strict=True))
        self._tokens = q, k, v
        return of_v

    @property
    def score_traces(self) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h m"]]:
        """Traces of queries and keys, for mechanisms that trace rows themselves."""
        if self._score_traces is None:
            self._score_traces = trace_vectors(self.q), trace_vectors(self.k)
        return self._score_traces

    def trace_scores(self) -> None:
        """Record in `trace` the rows whose scores are not finite."""
        self.trace = trace_rows(*self.score_traces, self.call, self.pattern, (self.n, self.m))

    def trace_values(self) -> None:
        """Do the same as `trace_all`, for rows that read values only."""
        q, k, v = self._hide()
        trace = trace_vectors(v)
        self.trace = trace_rows(None, trace, self.call, self.pattern, (self.n, self.m))
        self._tokens = q, k, zero_nonfinite(v, trace)

    def widen(self) -> None:
        """Promote queries, keys and values to at least fp32."""
        q, k, v = (promote_to_fp32(x) for x in self._hide())
        self._tokens = q, k, v

    def _hide(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._tokens is None:
            k, v = expand_heads(self.grouped_k, self.heads), expand_heads(self.grouped_v, self.heads)
            self._tokens = hide_tokens(self.grouped_q, k, v, self.seen_queries, self.seen_keys)
        return self._tokens

    def _find_seen(self) -> tuple[Tensor | None, Tensor | None]:
        if self._seen is None:
            mask = self.visible if self.call.pairs is not None else None
            self._seen = find_seen_tokens(self.call, self.pattern, self.n, self.m, mask)
        return self._seen
